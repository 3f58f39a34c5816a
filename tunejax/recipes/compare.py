"""`tunejax compare CONFIG`: many methods on one task, each with several seeds; then a table, pictures and a page.

All runs are those of `tunejax train`, one after the other in one process; memory is what the compiler says of each
step, so what another run has left behind does not count. The same command again goes on where it was stopped.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import yaml

from tunejax.config import compare, schema
from tunejax.core import errors
from tunejax.data.options import LABELLED
from tunejax.recipes import (
    assemble,
    folder,
    latency,
    measured,
    outcome,
    rows,
    runtime,
    settings,
    standings,
    train,
    validate,
)

RECORD = "compare.yaml"


def main(args: argparse.Namespace) -> int:
    """Runs the comparison; 0, or 1 where a run failed or its result is not what its ``expected`` says."""
    comparison = compare.load_comparison(args.config, args.overrides)
    chosen(comparison, args.only)
    check_folder(comparison)
    comparison = resolved(comparison, args.only)
    runs = chosen(comparison, args.only)
    check(comparison)
    check_rows(runs)
    begin(comparison)
    stopped = run_all(comparison, runs)
    found = standings.collect(comparison)
    if not lead():
        return 0
    standings.write(found, comparison.folder)
    print(found.markdown())
    if stopped:
        print(f"stopped by {stopped}; the same command goes on from there")
        return 0
    bad = [f"{r.label}, seed {r.seed}: {r.reason}" for r in found.runs if r.status == "failed"]
    bad += [f"{r.label}, seed {r.seed}: {line}" for r in runs for line in missed(r)]
    for line in bad:
        print(f"tunejax: {line}", file=sys.stderr)
    print(f"table, pictures and page: {comparison.folder}")
    return 1 if bad else 0


def chosen(comparison: compare.Comparison, only: list[str] | None) -> list[compare.Run]:
    """The runs to make. Raises ConfigError on a label that the comparison does not have."""
    labels = list(comparison.section.methods)
    for label in only or ():
        if label not in labels:
            raise errors.ConfigError(f"--only: no method is labelled {label!r}. {errors.did_you_mean(label, labels)}")
    return [r for r in comparison.runs if not only or r.label in only]


def check_folder(comparison: compare.Comparison) -> None:
    """Raises ConfigError where the output folder holds something else than a comparison."""
    out = comparison.folder
    if out.exists() and not (out.is_dir() and ((out / RECORD).is_file() or not any(out.iterdir()))):
        raise errors.ConfigError(f"output_dir {out} is there and not of a comparison (it has no {RECORD})")


def resolved(comparison: compare.Comparison, only: list[str] | None = None) -> compare.Comparison:
    """``comparison`` with parts in place of budgets of latency (`recipes.latency`), one measurement for all seeds.

    only: labels of the runs to make; others keep their budgets.

    Raises:
      TunejaxError: what `latency.resolved` refuses, naming the method.
    """
    methods: dict[str, Any] = {r.label: r.config.method for r in comparison.runs if only and r.label not in only}
    for run in sorted(comparison.runs, key=lambda r: not begun(r)):  # what a run was begun with holds for the others
        if run.label not in methods:
            with _named(run.label):
                if latency.pending(run.config):  # a file that is not there shows before minutes of measuring
                    validate.check_files(run.config)
                methods[run.label] = latency.resolved(run.config).method
    runs = [r._replace(config=r.config.model_copy(update={"method": methods[r.label]})) for r in comparison.runs]
    return comparison._replace(runs=runs)


def check(comparison: compare.Comparison) -> None:
    """Everything that can be known before the first run. Raises TunejaxError, naming the method; writes nothing."""
    known = [r for r in comparison.runs if not latency.pending(r.config)]
    for run in known:
        with _named(run.label, f" Or remove {run.config.output_dir} to make this run anew."):
            folder.claim(run.config)
    runtime.begin()
    for run in {r.label: r for r in known}.values():
        with _named(run.label):
            check_method(run.config, comparison.section.metric)


def check_method(config: schema.Config, metric: str) -> None:
    """One run's files, method, targets and settings, and that it measures ``metric``, without reading weights.

    Raises:
      TunejaxError: what does not fit.
    """
    validate.check_files(config)
    if not config.data.eval_path:
        raise errors.ConfigError("no rows to measure quality on: set data.eval_path")
    parts = validate.parts_of(config)
    settings.batches(config, parts.mesh)
    validate.check_optimizer(config)
    measured.check_best(parts)
    known = score_names(parts)
    if metric not in known:
        raise errors.ConfigError(f"compare.metric: {metric!r} is not measured. {errors.did_you_mean(metric, known)}")


def check_rows(runs: list[compare.Run]) -> None:
    """The rows as the first method that is to be run has them: a bad one is mostly no method's failure.

    A method with virtual tokens is passed over, since whether rows fit beside these is its own matter.

    Raises:
      DataError: a row or file that cannot be used, naming the method.
    """
    for label, run in {r.label: r for r in runs if to_be_made(r)}.items():
        opened = assemble.opened(run.config)
        if not opened.prompt:
            with _named(label):
                rows.read(run.config, opened.tokenizer, opened.model_config.kind, known=opened.known)
            return


def score_names(parts: assemble.Parts) -> list[str]:
    """The scores that a run of these parts may have in its summary, each with "eval_" before it."""
    found = set(measured.evaluated(parts))
    if parts.config.objective.name not in LABELLED:
        found.add("eval_perplexity")
    if measured.may_match(parts.config):
        found.add("eval_exact_match")
    return sorted(found)


def begin(comparison: compare.Comparison) -> None:
    """Makes the folder and says in it what is compared."""
    if not lead():
        return
    record = {"name": comparison.name, "compare": comparison.section.model_dump(mode="json")}
    folder.write(comparison.folder / RECORD, yaml.safe_dump(record, sort_keys=False, allow_unicode=True))


def run_all(comparison: compare.Comparison, runs: list[compare.Run]) -> str:
    """Makes the runs that are not finished or failed. Returns the signal that stopped it, or ""."""
    todo = [r for r in runs if to_be_made(r)]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are there already")
    for run in runs:
        if failure(run).is_file():
            print(f"{run.label}, seed {run.seed} failed before; remove {failure(run)} to try it again")
    begun = time.perf_counter()
    for i, run in enumerate(todo):
        left = (time.perf_counter() - begun) / i * (len(todo) - i) if i else None
        about = "" if left is None else f", about {standings.duration(left)} to go"
        print(f"\n[{i + 1} of {len(todo)}{about}] {run.label}, seed {run.seed}", flush=True)
        stopped = run_one(run)
        if stopped:
            return stopped
        if lead():
            standings.collect(comparison).save(comparison.folder)
        if i + 1 < len(todo) and todo[i + 1].label != run.label:
            jax.clear_caches()  # programs of this method serve no other one
        gc.collect()
    return ""


def run_one(run: compare.Run) -> str:
    """One run. A failure is written down beside its folder. Returns the signal that stopped it, or ""."""
    try:
        stopped = train.run(run.config).get("stopped", "")
        return stopped if stopped.startswith("SIG") else ""
    except errors.TunejaxError as e:
        note = {"reason": str(e)}
    except Exception as e:  # such as a lack of memory: the other methods may well fit
        note = {"reason": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
    print(f"failed: {note['reason']}", file=sys.stderr, flush=True)
    if lead():
        folder.write_json(failure(run), note)
    return ""


def lead() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def failure(run: compare.Run) -> Path:
    """The file that says why a run failed."""
    return standings.failure(Path(run.config.output_dir))


def begun(run: compare.Run) -> bool:
    """Whether it has a run folder."""
    return (Path(run.config.output_dir) / "config.yaml").is_file()


def finished(run: compare.Run) -> bool:
    """Whether it has a summary."""
    return (Path(run.config.output_dir) / "summary.json").is_file()


def to_be_made(run: compare.Run) -> bool:
    """Whether it has neither ended nor failed."""
    return not finished(run) and not failure(run).is_file()


def missed(run: compare.Run) -> list[str]:
    """What the summary of a finished run has outside the ranges that its config expects."""
    if not finished(run):
        return []
    text = (Path(run.config.output_dir) / "summary.json").read_text(encoding="utf-8")
    return outcome.check_expected(run.config, json.loads(text))


@contextmanager
def _named(label: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except errors.TunejaxError as e:
        raise type(e)(f"compare.methods.{label}: {e}{advice}") from None
