"""`tunejax train CONFIG`: a run from its config to its summary, read from top to bottom."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from tunejax import plots
from tunejax.config import load, schema
from tunejax.core import digest, errors, method, paths, table
from tunejax.core.model import key_shape
from tunejax.methods import report
from tunejax.objectives import features
from tunejax.recipes import adapter, assemble, folder, latency, rows, runtime, samples, settings, teacher
from tunejax.train import checkpoint, loop, metrics, on_policy, sharding, state, step


def main(args: argparse.Namespace) -> int:
    """Runs the config; 0, or 1 where the result is not what its ``expected`` says."""
    config = load.load(args.config, args.overrides)
    return 1 if told_missed(config, run(config)) else 0


def told_missed(config: schema.Config, summary: dict[str, Any]) -> bool:
    """Whether the result is not what ``expected`` says; prints where it is not."""
    missed = [line for one in summary.get("members", [summary]) for line in check_expected(config, one)]
    for line in missed:
        print(f"tunejax: {line}", file=sys.stderr)
    return bool(missed)


def run(config: schema.Config) -> dict[str, Any]:
    """Tunes the model, or goes on where a killed run of the same config stopped; returns what summary.json holds.

    Where ``distill.teacher`` is a config, its run is made, or gone on with, before. What a method is to be fast as is
    measured when the run begins (`recipes.latency`).

    Raises:
      TunejaxError: what does not fit in config, rows, checkpoint or targets; then nothing has been written.
    """
    config = latency.resolved(config)
    stopped = teacher_first(config)
    if stopped:
        return stopped
    if config.many:
        from tunejax.recipes import many

        return many.run(config)
    out = folder.claim(config)
    if (out / "summary.json").is_file():
        print(f"{out} is finished; this is its summary. Remove summary.json to measure and sample anew.")
        return json.loads((out / "summary.json").read_text(encoding="utf-8"))
    runtime.begin()

    # What the config names, and the rows: mistakes show here, before weights are read and anything is written.
    mesh = sharding.make_mesh(**config.mesh.model_dump())
    sizes = settings.batches(config, mesh)
    opened = assemble.opened(config)
    data = rows.read(config, opened.tokenizer, opened.model_config.kind, opened.prompt)
    parts = assemble.parts(config, opened, num_labels=len(data.labels), mesh=mesh)
    beside, writes = teacher.arrays(parts, data.train), teacher.on_policy(parts, data.train)
    loaders = rows.loaders(config, data, sizes, parts.tokenizer, beside)
    total = settings.total_steps(config, loaders.train.plan.steps)
    optimizer = settings.optimizer(config, total)

    # The step compiles while the base is read; a teacher's objective is not whole yet.
    one = training_step(parts, optimizer, sizes, total)
    if config.distill is None:
        planned = state.plan(parts.model, parts.method, optimizer, assemble.shapes(parts), mesh)
        one.prepare(*planned, {}, sharding.abstract_batch(loaders.train.build(0), mesh))

    # The base, its digest, and what the method makes of it.
    loaded = assemble.load(parts)
    shapes = jax.eval_shape(parts.method.init, key_shape(), loaded.params)
    counts = table.table(loaded.params, method.learning(parts.method, shapes.train), shapes.edits)
    announce(parts, counts, report.describe(parts.method, loaded.params, shapes), data, total)
    fresh = {p: adapter.on_host(paths.get(loaded.params, p)) for p in loaded.fresh if p not in shapes.edits}
    taught = teacher.find(parts, beside)
    tuned, parts = parts, taught.with_method(parts)
    key = jax.random.key(config.seed)
    begun, base = state.start(parts.model, parts.method, optimizer, loaded.params, key, mesh)
    if config.distill is not None:
        parts = teacher.beside(parts, taught, base)
        one = training_step(parts, optimizer, sizes, total)
    loaded = loaded._replace(params={})  # what trains whole has moved out of it

    # The loop. From here on files are written.
    if jax.process_index() == 0:
        folder.begin(config)
    options = settings.loop_options(config, total)
    saved = checkpoint.Checkpointer(
        out / "checkpoints", keep=config.train.save_total_limit, greater_is_better=options.higher_wins
    )
    judge = samples.Judge(parts, one, data, loaders.evaluation)
    start_scores = samples.before(judge, begun, base, out)
    result = loop.fit(
        one if writes is None else on_policy.OnPolicy(one, writes), begun, base, loaders.train, options,
        eval_loader=loaders.evaluation,
        checkpointer=saved,
        writers=lambda at: metrics.make_writers(out, config.train.report_to, at),
        learning_rate=optimizer.learning_rate,
    )  # fmt: skip
    final, at = result.state, result.step
    if settings.keeps_best(config) and result.best_step not in (None, at):
        final, at = saved.restore(final, result.best_step).state, int(result.best_step)
    saved.close()
    if result.stopped.startswith("SIG"):
        print(f"stopped by {result.stopped} at step {result.step}; the same command goes on from there")
        return {"stopped": result.stopped, "step": result.step}

    # What comes out: the adapter, samples, a picture, the summary.
    check_untouched(loaded.prints, base, shapes.edits)
    ran = {
        "step": at,
        "steps_run": result.step,
        "stopped": result.stopped,
        "best_step": result.best_step,
        "skipped_updates": int(result.state.nonfinite[1]),
        "optimizer_bytes": state.nbytes(result.state.opt_state),
        "step_memory_bytes": result.memory,
        "tokens_per_second": result.watch.tokens_per_second,
        "train_seconds": result.watch.seconds,
    }
    summary, end_scores = leave(
        out, tuned, taught.sizes, judge, final, base, loaded.base, counts, fresh, start_scores, ran
    )
    if jax.process_index():
        return summary
    conclude(out, tuned, start_scores, end_scores, summary)
    return summary


def teacher_first(config: schema.Config) -> dict[str, Any]:
    """Makes the run of the config that ``distill.teacher`` names, if it does; what it says where it was stopped."""
    theirs = teacher.config_of(config)
    if theirs is None or (folder.claim(config) / "summary.json").is_file():
        return {}
    assemble.opened(config)  # a mistake of the student's shows before its teacher trains
    print(f"first the teacher, {theirs.output_dir}")
    summary = run(theirs)
    told_missed(theirs, summary)
    return summary if was_stopped(summary) else {}


def was_stopped(summary: dict[str, Any]) -> bool:
    """Whether the run was told to stop, and goes on when it is started again."""
    return str(summary.get("stopped", "")).startswith("SIG")


def training_step(parts: assemble.Parts, optimizer: Any, sizes: settings.Batches, total: int) -> step.Step:
    """The step of these parts, for a run of ``total`` steps."""
    return step.make_step(
        parts.model, parts.method, parts.objective, optimizer, mesh=parts.mesh, accumulate=sizes.accumulate,
        max_grad_norm=parts.config.train.max_grad_norm, runs=total,
    )  # fmt: skip


def leave(
    out: Path, tuned: assemble.Parts, beside: Mapping[str, Any], judge: samples.Judge, final: state.TrainState,
    base: paths.Params, origin: adapter.Base, counts: table.Table, fresh: dict[str, Any],
    start_scores: dict[str, float], ran: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, float]]:  # fmt: skip
    """Writes the adapter and the samples of a run; returns its summary and its scores.

    tuned: whose method is kept; beside: what else trained, as of `features.own`; ran: what the summary says of the
    loop.
    """
    parts, config, data = judge.parts, judge.parts.config, judge.rows
    info = {"method": config.method, "name": tuned.method.name, "head": config.model.head, "seed": config.seed,
            "num_labels": parts.model_config.num_labels, "labels": list(data.labels), "step": ran["step"]}  # fmt: skip
    own = {name: features.own(tuned.method, beside, getattr(final, name)) for name in ("train", "state")}
    adapter.save(out / "adapter", {**own, "fresh": fresh}, origin, info)
    end_scores = judge(final, base, out, "after")
    summary = {
        **{f"before_{k}": v for k, v in start_scores.items()},
        **{f"eval_{k}": v for k, v in end_scores.items()},
        **ran,
        "trained_parameters": counts.trained,
        "all_parameters": counts.total + counts.added,
        "trained_share": counts.share,
        "devices": runtime.devices(),
        "base": origin._asdict(),
        "rows": data.counts(),
    }
    return summary, end_scores


def announce(parts: assemble.Parts, counts: table.Table, targets: report.Report, data: rows.Rows, total: int) -> None:
    """Prints what is about to run."""
    if jax.process_index():
        return
    print(f"{parts.name} ({parts.model_config.family}), {parts.method.name}, {total} steps, {data.line()}")
    for line in [*targets.text().splitlines(), counts.summary(), *(f"warning: {w}" for w in data.warnings())]:
        print(f"  {line}")


def check_untouched(before: dict[str, str], base: paths.Params, edits: dict[str, Any]) -> None:
    """The base is bit-identical to what was loaded, but for the method's edits. Raises TunejaxError where it is not."""
    kept = {p: x for p, x in paths.flatten(base).items() if p not in edits}
    after = digest.leaf_digests(paths.unflatten(kept))
    changed = [p for p, d in after.items() if before.get(p) != d]
    if changed:
        raise errors.TunejaxError(f"the base changed during the run, which must not be: {', '.join(changed[:5])}")


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
    skipped = summary["rows"]["skipped"]
    if skipped:
        print(f"  rows skipped: {', '.join(f'{n} {reason}' for reason, n in skipped.items())}")
    print(f"run folder: {out}")


def check_expected(config: schema.Config, summary: dict[str, Any]) -> list[str]:
    """One line for each number of the summary that lies outside the range that the config expects."""
    lines = []
    for name, (low, high) in config.expected.items():
        if "step" in summary and name not in summary and summary.get("stopped", "").startswith("SIG"):
            continue
        value = summary.get(name)
        if not isinstance(value, int | float):
            lines.append(f"expected {name}, which the summary does not have. {errors.did_you_mean(name, summary)}")
        elif not low <= value <= high:
            lines.append(f"{name} is {value:.4g}; the config expects {low:g} to {high:g}")
    return lines
