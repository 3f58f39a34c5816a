"""`tunejax train CONFIG` where the config has a section `many:`: several runs on one base, in one program.

Each entry of `many:` says what one member has else than the config: `seed`, `train.learning_rate`, and of methods whose
change is a product of factors, `method.rank` and `method.alpha`. Each member ends as a run folder of its own.
"""

import json
from pathlib import Path
from typing import Any

import jax
import optax

from tunejax.config import schema
from tunejax.core import errors, paths, table
from tunejax.core.model import key_shape
from tunejax.methods import report
from tunejax.recipes import adapter, assemble, folder, members, rows, runtime, samples, settings, teacher, train
from tunejax.train import checkpoint, loop, many, metrics, sharding, state, step


def run(config: schema.Config) -> dict[str, Any]:
    """Trains all members, or goes on where a killed run stopped; returns what summary.json holds.

    Raises:
      ConfigError: members that do not fit into one program; otherwise as `train.run`.
    """
    configs = members.configs_of(config)
    out = folder.claim(config)
    if (out / "summary.json").is_file():
        print(f"{out} is finished; this is its summary. Remove summary.json to measure and sample anew.")
        return json.loads((out / "summary.json").read_text(encoding="utf-8"))
    runtime.begin()
    if jax.process_count() > 1:
        raise errors.ConfigError("many: several members run in one process; start one, or train them one by one")

    # What the config names, and the rows, once for all.
    mesh = sharding.make_mesh(**config.mesh.model_dump())
    sizes = settings.batches(config, mesh)
    largest, plans = members.plan(configs)
    opened = assemble.opened(config.model_copy(update={"method": largest}))
    data = rows.read(config, opened.tokenizer, opened.model_config.kind, opened.prompt)
    parts = assemble.parts(config, opened, num_labels=len(data.labels), mesh=mesh)
    own = members.each_parts(parts, configs)
    beside = teacher.arrays(parts, data.train)
    if teacher.on_policy(parts, data.train) is not None:
        raise errors.ConfigError("many: with distill.on_policy each member writes its own rows; train them one by one")
    loaders = {c.seed: rows.loaders(c, data, sizes, parts.tokenizer, beside) for c in configs}
    total = members.steps(config, loaders.values())
    evaluation = loaders[configs[0].seed].evaluation

    # One base; what every member begins with.
    taught = teacher.find(parts, beside)
    if taught.sizes:
        raise errors.ConfigError(
            f"many: distill.hidden trains projections beside {parts.method.name}, which members of one program cannot; "
            "set distill.hidden.project: false, or train them one by one"
        )
    loaded = assemble.load(parts)
    heads = members.drawn_heads(own, loaded)
    shapes = jax.eval_shape(parts.method.init, key_shape(), loaded.params)
    likes = [jax.eval_shape(p.method.init, key_shape(), loaded.params) for p in own]
    counts = [table.table(loaded.params, like.train, like.edits) for like in likes]
    told = report.describe(parts.method, loaded.params, shapes)
    train.announce(parts, table.table(loaded.params, shapes.train, shapes.edits), told, data, total)
    fresh = {p: adapter.on_host(paths.get(loaded.params, p)) for p in loaded.fresh if p not in shapes.edits}
    optimizer = settings.optimizer(config, total)
    begun, base = many.start(
        parts.model, parts.method, [p.method for p in own],
        [many.factors_of(shapes, members.keyed(parts.method, f)) for f in plans], optimizer, loaded.params,
        [jax.random.key(c.seed) for c in configs], mesh, heads=heads,
    )  # fmt: skip
    parts = teacher.beside(parts, taught, base)
    loaded = loaded._replace(params={})

    # The loop. From here on files are written.
    folder.begin(config)
    for c in configs:
        folder.begin(c)
    one = many.make_step(
        parts.model, parts.method, parts.objective, lambda rate: settings.optimizer(config, total, rate),
        [c.train.learning_rate for c in configs], mesh=mesh, accumulate=sizes.accumulate,
        max_grad_norm=config.train.max_grad_norm,
    )  # fmt: skip
    judges = [judge(p._replace(objective=parts.objective), data, evaluation) for p in own]
    first = [
        samples.before(j, many.member(begun, i, like), base, Path(c.output_dir))
        for i, (j, like, c) in enumerate(zip(judges, likes, configs, strict=True))
    ]
    together = members.Together([loaders[c.seed].train for c in configs])
    saved = checkpoint.Checkpointer(out / "checkpoints", keep=config.train.save_total_limit)
    result = loop.fit(
        one, begun, base, together, settings.loop_options(config, total),
        eval_loader=evaluation,
        checkpointer=saved,
        writers=lambda at: metrics.make_writers(out, config.train.report_to, at),
        learning_rate=optimizer.learning_rate,
    )  # fmt: skip
    saved.close()
    if result.stopped.startswith("SIG"):
        print(f"stopped by {result.stopped} at step {result.step}; the same command goes on from there")
        return {"stopped": result.stopped, "step": result.step}

    # What comes out: a run folder for each member, and a summary of all.
    train.check_untouched(loaded.prints, base, shapes.edits)
    summaries = []
    for i, (c, like) in enumerate(zip(configs, likes, strict=True)):
        final, where = many.member(result.state, i, like), Path(c.output_dir)
        ran = {
            "step": result.step, "steps_run": result.step, "stopped": result.stopped,
            "best_step": None, "skipped_updates": int(final.nonfinite[1]),
            "optimizer_bytes": state.nbytes(result.state.opt_state) // len(configs), "step_memory_bytes": result.memory,
            "tokens_per_second": result.watch.tokens_per_second, "train_seconds": result.watch.seconds,
        }  # fmt: skip
        folder.write_rows(where / "metrics.jsonl", members.log_of(out, config, c, i))
        print(f"member {i}: seed {c.seed}, learning rate {c.train.learning_rate:g}, {judges[i].parts.method.name}")
        summary, scores = train.leave(
            where, judges[i].parts, {}, judges[i], final, base, loaded.base, counts[i], fresh, first[i], ran
        )
        train.conclude(where, judges[i].parts, first[i], scores, summary)
        summaries.append({"output_dir": c.output_dir, "seed": c.seed, **summary})
    summary = {"step": result.step, "stopped": result.stopped, "members": summaries}
    folder.write_json(out / "summary.json", summary)
    return summary


def judge(parts: assemble.Parts, data: rows.Rows, batches: Any) -> samples.Judge:
    """What a member is measured by: as its own run is."""
    one = step.make_step(parts.model, parts.method, parts.objective, optax.identity(), mesh=parts.mesh)
    return samples.Judge(parts, one, data, batches)
