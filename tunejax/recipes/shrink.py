"""`tunejax shrink RUN|CONFIG OUTPUT`: the smaller model that a run's masks leave, for transformers, with what it saves.

Of a config the run is made first, or gone on with. The output appears as a whole, so a command that was stopped is the
same command again; where it has finished, it says so.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.config import load, schema
from tunejax.core import errors, masked, method
from tunejax.core.model import key_shape
from tunejax.models import cut
from tunejax.recipes import (
    artefact,
    assemble,
    before_after,
    exported,
    folder,
    latency,
    outcome,
    rows,
    runtime,
    search,
    settings,
    train,
)

RECORD = "shrink.json"
SEARCHED = {"metric": "loss", "evaluations": 50, "seed": 0}
"""Options of the search among a supernet's sizes beside what is asked for, and what they are where no flag says."""


def main(args: argparse.Namespace) -> int:
    """Trains where a config is named; then cuts, measures and writes. 1 where the run misses its ``expected``.

    Raises:
      ConfigError: the output folder holds something else, the run masks nothing, or the family cannot say the sizes.
      NotLinear: an operator has no plain kernel.
    """
    output, code, wanted = Path(args.output), 0, asked_for(args)
    if Path(args.run).is_file():
        config = load.load(args.run, args.overrides)
        args.run, args.overrides = config.output_dir, []
        written(output, command(args))
        config = latency.resolved(config)
        check(config, wanted)
        summary = train.run(config)
        if outcome.was_stopped(summary):
            return 0
        code = int(outcome.told_missed(config, summary))
    asked = {**command(args), "config": digest(args.run)}
    found = written(output, asked)
    if found is None:
        found = make(args, output, asked)
    else:
        print(f"{output} is finished; this is what it says")
    if found["search"] is not None:
        print(search.table(found["search"]) + "\n")
    print(before_after.table(found))
    for line in found.get("warnings", []):
        print(f"warning: {line}")
    print(f"logits differ from the masked model's by at most {folder.number(found['difference']):.1e}")
    print(f"{output}: {found['name']} shrunk by {found['method']}")
    return code


def command(args: argparse.Namespace) -> dict[str, Any]:
    """What of the command decides what comes out."""
    names = ("run", "overrides", "dtype", "batch", "length", "parameters", "flops", *SEARCHED)
    given = {name: getattr(args, name) for name in names}
    return {name: SEARCHED.get(name) if value is None else value for name, value in given.items()}


def asked_for(args: argparse.Namespace) -> search.Asked | None:
    """What is searched for among the sizes of a supernet; None where the run has its size. Raises ConfigError."""
    by, asked = [name for name in ("parameters", "flops") if getattr(args, name) is not None], command(args)
    if not by:
        for name in SEARCHED:
            if getattr(args, name) is not None:
                raise errors.ConfigError(f"--{name} is of the search that --parameters or --flops asks for; give one")
        return None
    most = asked[by[0]]
    if len(by) > 1 or not 0 < most <= 1 or asked["evaluations"] < 1:
        raise errors.ConfigError("give --parameters or --flops, a part in (0, 1], and at least 1 of --evaluations")
    return search.Asked(by[0], most, asked["metric"], asked["evaluations"], asked["seed"], args.length)


def digest(run: str) -> str:
    """Of the config of a run, so that an output of another run in the same folder is told apart."""
    if not (Path(run) / "config.yaml").is_file() and artefact.is_run(run):
        return ""
    text = (folder.find(run) / "config.yaml").read_bytes()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def written(output: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished command has left in ``output``; None where there is nothing yet.

    Raises:
      ConfigError: it holds something else, or what another command left.
    """
    if not (output / RECORD).is_file():
        folder.new(str(output))
        return None
    found = json.loads((output / RECORD).read_text(encoding="utf-8"))
    before = found.get("command", {})
    changed = [f"{k}: {before.get(k)!r} there, {v!r} now" for k, v in asked.items() if before.get(k) != v]
    if changed:
        raise errors.ConfigError(
            f"output {output} was left by another command ({'; '.join(changed)}); name a new folder"
        )
    return found


def check(config: schema.Config, wanted: search.Asked | None = None) -> None:
    """What can be told before the run of a config, from shapes alone: no weights are read.

    wanted: what is to be searched for afterwards.

    Raises:
      ConfigError: the run would leave nothing to cut, sizes that the family cannot say, or nothing to search among; or
        it ends before its masks.
      NotLinear: an operator has no plain kernel.
    """
    if config.many:
        raise errors.ConfigError("many: tunejax shrink cuts one run; train them, then name a member's folder")
    runtime.begin()
    parts = assemble.parts(config, assemble.opened(config))

    def begun(key: Any) -> tuple[Any, Any]:
        params = parts.model.init(key)
        start = parts.method.init(key, params)
        base = method.apply_edits(params, start.edits)
        return parts.method.bind(base, start.train, start.state, method.Context()), start.state

    bound, state = jax.eval_shape(begun, key_shape())
    cut.check_places(bound)
    if not masked.any_stands(bound):
        raise errors.ConfigError(nothing(config.output_dir, parts))
    jax.eval_shape(cut.bare, bound)

    def numbers(key: Any) -> tuple[Any, Any]:
        state = begun(key)[1]
        return masked.targets(state), masked.counts(state)

    # Numbers of units depend on no parameter, so the compiler leaves out all else.
    targets, counts = jax.jit(numbers)(jax.random.key(0))
    left = cut.smaller(parts.model_config, {name: int(n) for name, n in targets.items()})
    cut.check(left, config.model.head or "lm")
    if wanted is not None:
        search.opened(parts, config.output_dir, counts, masked.taken_off(bound), wanted)
    masking = [m for m, own in method.split(parts.method, state) if m.updates and masked.targets(own)]
    short = settings.cut_short(method.chain(*masking), steps(config, parts)) if masking else None
    if short:
        raise errors.ConfigError(short)


def steps(config: schema.Config, parts: assemble.Parts) -> int:
    """How many the run of a config has; its rows are read only where they decide."""

    def of(epochs: float) -> int:
        data = rows.read(config, parts.tokenizer, parts.model_config.kind, parts.prompt, parts.known)
        loaders = rows.loaders(config, data, settings.batches(config, parts.mesh), parts.tokenizer)
        return loaders.train.plan.steps(epochs)

    return settings.total_steps(config, of)


def on_the_way(masks: cut.Masks, state: Any) -> list[str]:
    """One line for each dimension whose masks keep more than they were to come down to."""
    told = {name: (int(masks[name][0].sum()), int(n)) for name, n in masked.targets(state).items() if name in masks}
    return [
        f"{name}: {kept} of {masks[name].shape[1]} are kept, and the target is {target}: what was cut is from before "
        "the end of the schedule (begin + steps)"
        for name, (kept, target) in told.items()
        if kept > target
    ]


def nothing(run: str, parts: assemble.Parts) -> str:
    """What a run is told that masks no units."""
    return f"{run} masks nothing: its method is {parts.method.name}; chain shrink after it, or use tunejax export"


def make(args: argparse.Namespace, output: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Cuts the run, compares with the masked model, and writes checkpoint, report and picture; returns the report."""
    runtime.begin()
    wanted = asked_for(args)
    tuned = artefact.open_run(args.run, args.overrides)
    parts, config = tuned.parts, tuned.parts.model_config
    head, dtype = parts.config.model.head or "lm", jnp.dtype(parts.config.model.dtype)
    bound, found = (tuned.params, None) if wanted is None else search.run(tuned, args.run, wanted)
    masks = cut.masks(bound, config)
    if not masks:
        raise errors.ConfigError(nothing(args.run, parts))
    whole = cut.bare(bound)
    small, smaller = cut.cut(whole, masks, config, masked.scores(tuned.state))
    cut.check(smaller, head)

    batch = before_after.random_batch(config, args.batch, args.length)
    models = [before_after.built(c, p, head, dtype) for c, p in ((config, whole), (smaller, small))]
    (_, slow), (said, fast) = before_after.logits(models, batch)
    [(expected, _)] = before_after.logits([(parts.model, bound)], batch)
    half = output.with_name(f".{output.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    exported.save(half, small, smaller, tuned, args.dtype)
    report = {
        "command": asked,
        "run": args.run,
        "name": parts.name,
        "method": parts.method.name,
        "before": before_after.sizes(config, head, args.length, slow),
        "after": before_after.sizes(smaller, head, args.length, fast),
        "kept": {name: f"{int(mask[0].sum())} of {mask.shape[1]}" for name, mask in masks.items()},
        "difference": float(np.abs(np.asarray(said - expected, np.float32)).max()),
        "quality": before_after.quality(tuned, bound, half),
        "search": found,
        "warnings": on_the_way(masks, tuned.state),
    }
    if found is not None:
        search.picture(found, half / "pareto.png")
    before_after.picture(report, half / "shrink.png")
    folder.write_json(half / RECORD, report)
    half.replace(output)
    return report
