"""`tunejax train CONFIG`: a run from its config to its summary, read from top to bottom."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tunejax.config import load, schema
from tunejax.core import paths, rates, table
from tunejax.core.model import key_shape
from tunejax.methods import report
from tunejax.recipes import (
    adapter,
    assemble,
    folder,
    latency,
    measured,
    outcome,
    rows,
    runtime,
    samples,
    settings,
    teacher,
)
from tunejax.train import checkpoint, loop, metrics, on_policy, sharding, state, step


class Ready(NamedTuple):
    """What is known of a run before weights are read.

    one: the step; beside: arrays that go with the rows; writes: how a student writes rows of its own, if it does.
    """

    parts: assemble.Parts
    data: rows.Rows
    loaders: rows.Loaders
    total: int
    optimizer: Any
    one: step.Step
    beside: Any
    writes: Any


class Begun(NamedTuple):
    """What a run's loop starts from. parts: with what the teacher adds; one: their step; kept: for the end."""

    parts: assemble.Parts
    one: step.Step
    state: state.TrainState
    kept: outcome.Kept


def main(args: argparse.Namespace) -> int:
    """Runs the config; 0, or 1 where the result is not what its ``expected`` says."""
    config = load.load(args.config, args.overrides)
    return 1 if outcome.told_missed(config, run(config)) else 0


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
    ended = outcome.finished(out)
    if ended is not None:
        return ended
    runtime.begin()
    ready = prepare(config)
    return carry_out(ready, begin(ready))


def prepare(config: schema.Config) -> Ready:
    """What the config names, and the rows: mistakes show here, before weights are read and anything is written."""
    mesh = sharding.make_mesh(**config.mesh.model_dump())
    sizes = settings.batches(config, mesh)
    opened = assemble.opened(config)
    data = rows.read(config, opened.tokenizer, opened.model_config.kind, opened.prompt, opened.known)
    parts = assemble.parts(config, opened, num_labels=len(data.labels), mesh=mesh)
    measured.check(parts, data)
    beside, writes = teacher.arrays(parts, data.train), teacher.on_policy(parts, data.train)
    loaders = rows.loaders(config, data, sizes, parts.tokenizer, beside)
    total = settings.total_steps(config, loaders.train.plan.steps)
    optimizer = settings.optimizer(config, total)
    one = training_step(parts, optimizer, total)
    if config.distill is None:  # the step compiles while the base is read; a teacher's objective is not whole yet
        planned = state.plan(parts.model, parts.method, optimizer, assemble.shapes(parts), mesh)
        one.prepare(*planned, {}, sharding.abstract_batch(loaders.train.build(0), mesh))
    return Ready(parts, data, loaders, total, optimizer, one, beside, writes)


def begin(ready: Ready) -> Begun:
    """The base, its digest, and what the method makes of it."""
    tuned, one = ready.parts, ready.one
    loaded = assemble.load(tuned)
    shapes = jax.eval_shape(tuned.method.init, key_shape(), loaded.params)
    counts = rates.counts(tuned.method, loaded.params, shapes)
    frozen = [p for p in loaded.fresh if p not in shapes.edits]
    announce(tuned, counts, report.describe(tuned.method, loaded.params, shapes), ready.data, ready.total, frozen)
    fresh = {p: adapter.on_host(paths.get(loaded.params, p)) for p in frozen}
    taught = teacher.find(tuned, ready.beside, ready.data.labels)
    parts = taught.with_method(tuned)
    key = jax.random.key(tuned.config.seed)
    begun, base = state.start(parts.model, parts.method, ready.optimizer, loaded.params, key, parts.mesh)
    if tuned.config.distill is not None:
        parts = teacher.beside(parts, taught, base)
        one = training_step(parts, ready.optimizer, ready.total)
    kept = outcome.Kept(tuned, taught.sizes, base, loaded.base, loaded.prints, shapes.edits, fresh, counts)
    return Begun(parts, one, begun, kept)  # `loaded.params` ends here: what trains whole has moved out of it


def carry_out(ready: Ready, begun: Begun) -> dict[str, Any]:
    """The loop, and what comes out of it. From here on files are written."""
    config, out = begun.parts.config, Path(begun.parts.config.output_dir)
    if jax.process_index() == 0:
        folder.begin(config)
    judge = samples.Judge(begun.parts, begun.one, ready.data, ready.loaders.evaluation)
    start_scores = samples.before(judge, begun.state, begun.kept.base, out)
    result, final, at = through(ready, begun)
    stopped = outcome.stopped(result)
    if stopped is not None:
        return stopped
    outcome.check_untouched(begun.kept)
    ran = outcome.ran(result, at, result.state)
    summary, end_scores = outcome.leave(out, begun.kept, judge, final, start_scores, ran)
    if jax.process_index() == 0:
        outcome.conclude(out, begun.kept.tuned, start_scores, end_scores, summary)
    return summary


def through(ready: Ready, begun: Begun) -> tuple[loop.Result, state.TrainState, int]:
    """All steps: how the loop ended, and the state that is kept with the step that it is of."""
    config, out = begun.parts.config, Path(begun.parts.config.output_dir)
    options = settings.loop_options(config, ready.total)
    saved = checkpoint.Checkpointer(
        out / "checkpoints", keep=config.train.save_total_limit, greater_is_better=options.higher_wins
    )
    result = loop.fit(
        begun.one if ready.writes is None else on_policy.OnPolicy(begun.one, ready.writes),
        begun.state, begun.kept.base, ready.loaders.train, options,
        eval_loader=ready.loaders.evaluation,
        checkpointer=saved,
        writers=lambda at: metrics.make_writers(out, config.train.report_to, at),
        learning_rate=ready.optimizer.learning_rate,
    )  # fmt: skip
    final, at = result.state, result.step
    if settings.keeps_best(config) and result.best_step not in (None, at):
        final, at = saved.restore(final, result.best_step).state, int(result.best_step)
        late = settings.unfinished(begun.kept.tuned.method, at)
        if late and jax.process_index() == 0:
            print(f"the best checkpoint, which is kept, is of step {at}, and {late}: its target is not reached there")
    saved.close()
    return result, final, at


def teacher_first(config: schema.Config) -> dict[str, Any]:
    """Makes the run of the config that ``distill.teacher`` names, if it does; what it says where it was stopped."""
    theirs = teacher.config_of(config)
    if theirs is None or (folder.claim(config) / "summary.json").is_file():
        return {}
    assemble.opened(config)  # a mistake of the student's shows before its teacher trains
    print(f"first the teacher, {theirs.output_dir}")
    summary = run(theirs)
    outcome.told_missed(theirs, summary)
    return summary if outcome.was_stopped(summary) else {}


def training_step(parts: assemble.Parts, optimizer: Any, total: int) -> step.Step:
    """The step of these parts, for a run of ``total`` steps."""
    return step.make_step(
        parts.model, parts.method, parts.objective, optimizer, mesh=parts.mesh,
        accumulate=settings.batches(parts.config, parts.mesh).accumulate,
        max_grad_norm=parts.config.train.max_grad_norm, runs=total,
    )  # fmt: skip


def announce(
    parts: assemble.Parts,
    counts: table.Table,
    targets: report.Report,
    data: rows.Rows,
    total: int,
    frozen: Sequence[str],
) -> None:
    """Prints what is about to run. frozen: what the checkpoint lacks, which was drawn and does not train itself."""
    if jax.process_index():
        return
    print(f"{parts.name} ({parts.model_config.family}), {parts.method.name}, {total} steps, {data.line()}")
    short = settings.cut_short(parts.method, total)
    drawn = (
        f"the checkpoint has no {', '.join(frozen)}: drawn at random, and left so unless a method above it trains; "
        f"add {{name: full, targets: [{', '.join('/' + p for p in frozen)}]}} to train it"
    )
    warnings = [*data.warnings(), *([short] if short else []), *([drawn] if frozen else [])]
    for line in [*targets.text().splitlines(), counts.summary(), *(f"warning: {w}" for w in warnings)]:
        print(f"  {line}")
