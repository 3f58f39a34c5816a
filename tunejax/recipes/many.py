"""`tunejax train CONFIG` where the config has a section `many:`: several runs on one base, in one program.

Each entry of `many:` says what one member has else than the config: `seed`, `train.learning_rate`, and of methods whose
change is a product of factors, `method.rank` and `method.alpha`. Each member ends as a run folder of its own.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from tunejax.config import schema
from tunejax.core import errors, paths, rates
from tunejax.core.model import key_shape
from tunejax.methods import report
from tunejax.recipes import (
    adapter,
    assemble,
    folder,
    measured,
    members,
    outcome,
    rows,
    runtime,
    samples,
    settings,
    teacher,
    train,
)
from tunejax.train import checkpoint, loop, many, metrics, sharding, state, step


class Ready(NamedTuple):
    """What is known of the members before weights are read.

    configs, own, plans: one of each member: its config, its parts, what its factors are; loaders: by seed.
    """

    config: schema.Config
    configs: list[schema.Config]
    plans: list[Any]
    parts: assemble.Parts
    own: list[assemble.Parts]
    data: rows.Rows
    loaders: dict[int, rows.Loaders]
    total: int
    beside: Any

    @property
    def evaluation(self) -> Any:
        """Batches of the held-out rows, which are the same for all."""
        return self.loaders[self.configs[0].seed].evaluation


class Begun(NamedTuple):
    """What the loop starts from. state: of all members; likes, kept: one of each, as of `train.Begun`."""

    parts: assemble.Parts
    likes: list[Any]
    state: state.TrainState
    kept: list[outcome.Kept]


def run(config: schema.Config) -> dict[str, Any]:
    """Trains all members, or goes on where a killed run stopped; returns what summary.json holds.

    Raises:
      ConfigError: members that do not fit into one program; otherwise as `train.run`.
    """
    configs = members.configs_of(config)
    out = folder.claim(config)
    ended = outcome.finished(out)
    if ended is not None:
        return ended
    runtime.begin()
    if jax.process_count() > 1:
        raise errors.ConfigError("many: several members run in one process; start one, or train them one by one")
    ready = prepare(config, configs)
    begun = begin(ready)
    for c in [config, *configs]:  # from here on files are written
        folder.begin(c)
    judges = [judge(p._replace(objective=begun.parts.objective), ready.data, ready.evaluation) for p in ready.own]
    first = [
        samples.before(j, many.member(begun.state, i, like), begun.kept[i].base, Path(c.output_dir))
        for i, (j, like, c) in enumerate(zip(judges, begun.likes, configs, strict=True))
    ]
    result = through(ready, begun)
    stopped = outcome.stopped(result)
    if stopped is not None:
        return stopped
    outcome.check_untouched(begun.kept[0])
    summaries = [leave(ready, begun, result, i, judges[i], first[i]) for i in range(len(configs))]
    summary = {"step": result.step, "stopped": result.stopped, "members": summaries}
    folder.write_json(out / "summary.json", summary)
    return summary


def prepare(config: schema.Config, configs: list[schema.Config]) -> Ready:
    """What the config names, and the rows, once for all. Raises ConfigError where members cannot be in one program."""
    mesh = sharding.make_mesh(**config.mesh.model_dump())
    sizes = settings.batches(config, mesh)
    largest, plans = members.plan(configs)
    opened = assemble.opened(config.model_copy(update={"method": largest}))
    data = rows.read(config, opened.tokenizer, opened.model_config.kind, opened.prompt, opened.known)
    parts = assemble.parts(config, opened, num_labels=len(data.labels), mesh=mesh)
    measured.check(parts, data)
    own = members.each_parts(parts, configs)
    beside = teacher.arrays(parts, data.train)
    if teacher.on_policy(parts, data.train) is not None:
        raise errors.ConfigError("many: with distill.on_policy each member writes its own rows; train them one by one")
    loaders = {c.seed: rows.loaders(c, data, sizes, parts.tokenizer, beside) for c in configs}
    total = members.steps(config, loaders.values())
    return Ready(config, configs, plans, parts, own, data, loaders, total, beside)


def begin(ready: Ready) -> Begun:
    """One base, and what every member begins with."""
    parts, own = ready.parts, ready.own
    taught = teacher.find(parts, ready.beside, ready.data.labels)
    if taught.sizes:
        raise errors.ConfigError(
            f"many: distill.hidden trains projections beside {parts.method.name}, which members of one program cannot; "
            "set distill.hidden.project: false, or train them one by one"
        )
    loaded = assemble.load(parts)
    heads = members.drawn_heads(own, loaded)
    shapes = jax.eval_shape(parts.method.init, key_shape(), loaded.params)
    likes = [jax.eval_shape(p.method.init, key_shape(), loaded.params) for p in own]
    counts = [rates.counts(p.method, loaded.params, like) for p, like in zip(own, likes, strict=True)]
    told = report.describe(parts.method, loaded.params, shapes)
    frozen = [p for p in loaded.fresh if p not in shapes.edits]
    train.announce(parts, rates.counts(parts.method, loaded.params, shapes), told, ready.data, ready.total, frozen)
    fresh = {p: adapter.on_host(paths.get(loaded.params, p)) for p in frozen}
    factors = [many.factors_of(shapes, members.keyed(parts.method, f)) for f in ready.plans]
    optimizer = settings.optimizer(ready.config, ready.total)
    begun, base = many.start(
        parts.model, parts.method, [p.method for p in own], factors, optimizer, loaded.params,
        [jax.random.key(c.seed) for c in ready.configs], parts.mesh, heads=heads,
    )  # fmt: skip
    kept = [
        outcome.Kept(p, {}, base, loaded.base, loaded.prints, shapes.edits, fresh, count)
        for p, count in zip(own, counts, strict=True)
    ]
    return Begun(teacher.beside(parts, taught, base), likes, begun, kept)


def through(ready: Ready, begun: Begun) -> loop.Result:
    """All steps of all members."""
    config, parts, out = ready.config, begun.parts, Path(ready.config.output_dir)
    one = many.make_step(
        parts.model, parts.method, parts.objective, lambda rate: settings.optimizer(config, ready.total, rate),
        [c.train.learning_rate for c in ready.configs], mesh=parts.mesh,
        accumulate=settings.batches(config, parts.mesh).accumulate, max_grad_norm=config.train.max_grad_norm,
    )  # fmt: skip
    saved = checkpoint.Checkpointer(out / "checkpoints", keep=config.train.save_total_limit)
    result = loop.fit(
        one, begun.state, begun.kept[0].base, members.Together([ready.loaders[c.seed].train for c in ready.configs]),
        settings.loop_options(config, ready.total),
        eval_loader=ready.evaluation,
        checkpointer=saved,
        writers=lambda at: metrics.make_writers(out, config.train.report_to, at),
        learning_rate=settings.optimizer(config, ready.total).learning_rate,
    )  # fmt: skip
    saved.close()
    return result


def leave(
    ready: Ready, begun: Begun, result: loop.Result, i: int, judge: samples.Judge, first: dict[str, float]
) -> dict[str, Any]:
    """The run folder of one member; returns its part of the summary."""
    config = ready.configs[i]
    final, out = many.member(result.state, i, begun.likes[i]), Path(config.output_dir)
    folder.write_rows(out / "metrics.jsonl", members.log_of(Path(ready.config.output_dir), ready.config, config, i))
    print(f"member {i}: seed {config.seed}, learning rate {config.train.learning_rate:g}, {judge.parts.method.name}")
    ran = outcome.ran(result, result.step, final, len(ready.configs)) | {"best_step": None}
    summary, scores = outcome.leave(out, begun.kept[i], judge, final, first, ran)
    outcome.conclude(out, judge.parts, first, scores, summary)
    return {"output_dir": config.output_dir, "seed": config.seed, **summary}


def judge(parts: assemble.Parts, data: rows.Rows, batches: Any) -> samples.Judge:
    """What a member is measured by: as its own run is."""
    one = step.make_step(parts.model, parts.method, parts.objective, optax.identity(), mesh=parts.mesh)
    return samples.Judge(parts, one, data, batches)
