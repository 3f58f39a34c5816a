"""What comes out of a run: the adapter, scores and samples, a picture, the summary; and whether that was expected."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tunejax import plots
from tunejax.config import schema
from tunejax.core import digest, errors, paths, table
from tunejax.objectives import features
from tunejax.recipes import adapter, artefact, assemble, folder, runtime, samples
from tunejax.train import loop, state


class Kept(NamedTuple):
    """What is known when a loop begins and is needed when it ends.

    tuned: whose method is kept; added: what trains beside it (`features.own`); base: what does not train; origin,
    prints: its name and digests; edits: of the method; fresh: what its checkpoint did not hold; counts: of parameters.
    """

    tuned: assemble.Parts
    added: Mapping[str, Any]
    base: paths.Params
    origin: adapter.Base
    prints: dict[str, str]
    edits: dict[str, Any]
    fresh: dict[str, Any]
    counts: table.Table


def finished(out: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended, which is not run again; None of another."""
    if not (out / "summary.json").is_file():
        return None
    print(f"{out} is finished; this is its summary. Remove summary.json to measure and sample anew.")
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def stopped(result: loop.Result) -> dict[str, Any] | None:
    """What a run that was told to stop says instead of a summary; None of another."""
    if not result.stopped.startswith("SIG"):
        return None
    print(f"stopped by {result.stopped} at step {result.step}; the same command goes on from there")
    return {"stopped": result.stopped, "step": result.step}


def was_stopped(summary: dict[str, Any]) -> bool:
    """Whether the run was told to stop, and goes on when it is started again."""
    return str(summary.get("stopped", "")).startswith("SIG")


def ran(result: loop.Result, at: int, own: state.TrainState, members: int = 1) -> dict[str, Any]:
    """What the summary says of the loop. at: the step that is kept; own: the state of this one of its members."""
    return {
        "step": at,
        "steps_run": result.step,
        "stopped": result.stopped,
        "best_step": result.best_step,
        "skipped_updates": int(own.nonfinite[1]),
        "optimizer_bytes": state.nbytes(result.state.opt_state) // members,
        "step_memory_bytes": result.memory,
        "tokens_per_second": result.watch.tokens_per_second,
        "train_seconds": result.watch.seconds,
    }


def check_untouched(kept: Kept) -> None:
    """The base is bit-identical to what was loaded, but for the method's edits. Raises TunejaxError where it is not."""
    same = {p: x for p, x in paths.flatten(kept.base).items() if p not in kept.edits}
    # Of a segment that trains whole nothing may be left to count its layers by.
    after = digest.leaf_digests(paths.unflatten(same), paths.starts(artefact.cuts(kept.tuned)))
    changed = [p for p, d in after.items() if kept.prints.get(p) != d]
    if changed:
        raise errors.TunejaxError(f"the base changed during the run, which must not be: {', '.join(changed[:5])}")


def leave(
    out: Path, kept: Kept, judge: samples.Judge, final: state.TrainState, start: dict[str, float], ran: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Writes the adapter and the samples of a run; returns its summary and its scores.

    start: scores before the first step; ran: what the summary says of the loop.
    """
    parts, config, data = judge.parts, judge.parts.config, judge.rows
    info = {"method": config.method, "name": kept.tuned.method.name, "head": config.model.head, "seed": config.seed,
            "num_labels": parts.model_config.num_labels, "labels": list(data.labels), "step": ran["step"],
            "row_format": data.format, "cuts": list(artefact.cuts(kept.tuned))}  # fmt: skip
    own = {name: features.own(kept.tuned.method, kept.added, getattr(final, name)) for name in ("train", "state")}
    adapter.save(out / "adapter", {**own, "fresh": kept.fresh}, kept.origin, info)
    end_scores = judge(final, kept.base, out, "after")
    summary = {
        **{f"before_{k}": v for k, v in start.items()},
        **{f"eval_{k}": v for k, v in end_scores.items()},
        **ran,
        "trained_parameters": kept.counts.trained,
        "all_parameters": kept.counts.total + kept.counts.added,
        "trained_share": kept.counts.share,
        "devices": runtime.devices(),
        "base": kept.origin._asdict(),
        "rows": data.counts(),
    }
    return summary, end_scores


def conclude(
    out: Path, parts: assemble.Parts, start: dict[str, float], end: dict[str, float], summary: dict[str, Any]
) -> None:
    """Draws the picture, writes the summary, prints before and after, and where everything lies."""
    plots.loss(
        folder.read_rows(out / "metrics.jsonl"), out / "plots" / "loss.png", f"{parts.name}, {parts.method.name}"
    )
    folder.write_json(out / "summary.json", summary)
    for name in end:
        print(f"  {name:<14}{start.get(name, float('nan')):>10.4f} before {end[name]:>10.4f} after")
    for name, kind in (("skipped", "rows"), ("eval_skipped", "held-out rows")):
        if skipped := summary["rows"].get(name):
            print(f"  {kind} skipped: {', '.join(f'{n} {reason}' for reason, n in skipped.items())}")
    print(f"run folder: {out}")


SCORED = ("eval_", "before_")
"""How names of scores begin: where there is one, null is a number that was none."""


def told_missed(config: schema.Config, summary: dict[str, Any]) -> bool:
    """Whether the result is not what ``expected`` says; prints where it is not."""
    missed = [line for one in summary.get("members", [summary]) for line in check_expected(config, one)]
    for line in missed:
        print(f"tunejax: {line}", file=sys.stderr)
    return bool(missed)


def check_expected(config: schema.Config, summary: dict[str, Any]) -> list[str]:
    """One line for each number of the summary that lies outside the range that the config expects."""
    lines = []
    for name, (low, high) in config.expected.items():
        if "step" in summary and name not in summary and summary.get("stopped", "").startswith("SIG"):
            continue
        value = summary.get(name)
        if name in summary and name.startswith(SCORED):
            value = folder.number(value)
        if not isinstance(value, int | float):
            lines.append(f"expected {name}, which the summary does not have. {errors.did_you_mean(name, summary)}")
        elif not low <= value <= high:
            lines.append(f"{name} is {value:.4g}; the config expects {low:g} to {high:g}")
    return lines
