"""`tunejax merge RUN RUN ... --output FOLDER`: the adapters of several runs on one base as one."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tunejax.config import load, schema
from tunejax.core import combine, errors, operators, paths
from tunejax.core.method import Method, chain
from tunejax.methods import registry
from tunejax.recipes import adapter, artefact, combined, folder, runtime, stacked
from tunejax.recipes.combined import STACKED, How, Made

DENSITY = 0.5
"""The share of entries that pruning keeps where no flag says it."""


def main(args: argparse.Namespace) -> None:
    """Writes a run folder that `generate`, `evaluate` and `export` read like any other.

    Raises:
      CheckpointError: the runs are of different bases.
      ConfigError: they cannot be combined so; the message says what can.
    """
    output = folder.new(args.output)
    if args.how == "stack":
        _stack(output, args)
        return
    how = settings(args)
    runtime.begin()
    runs = opened(args.runs)
    made = combined.of_weights(runs, how, args.rank) if args.of == "weights" else combined.of_adapters(runs, how)
    config = write(output, runs, made, {"runs": args.runs, "how": how.name, "weights": how.weights, "of": args.of})
    print(f"{output}: {how.name} of {len(runs)} runs on {runs[0].parts.name}, kept as {_named(config)}")


def _stack(output: Path, args: argparse.Namespace) -> None:
    given = {"--weights": args.weights, "--density": args.density, "--rank": args.rank}
    if flags := [k for k, v in given.items() if v is not None] + ["--of weights"] * (args.of == "weights"):
        raise errors.ConfigError(f"{flags[0]}: --how stack adds nothing up, so there is nothing to weigh or prune")
    runtime.begin()
    top, made = stacked.of(args.runs)
    write(output, [top], made, {"runs": args.runs, "how": args.how})
    print(f"{output}: {args.runs[-1]} above {', '.join(args.runs[:-1])} on {top.parts.name}")


def settings(args: argparse.Namespace) -> How:
    """The flags. Weights are 1 each, or 1 / runs where a plain sum would otherwise grow with their number.

    Raises:
      ConfigError: one out of range, or one that this way to combine does not take.
    """
    count = len(args.runs)
    if not all(map(math.isfinite, args.weights or [])):
        raise errors.ConfigError(f"--weights {' '.join(f'{w:g}' for w in args.weights)}: expected finite numbers")
    grows = args.how == STACKED or not combine.HOWS[args.how].elect
    weights = args.weights or [1 / count if grows else 1.0] * count
    name = "linear" if args.how == STACKED else args.how
    prunes = [how for how, its in combine.HOWS.items() if its.prune]
    if args.density is not None and name not in prunes:
        raise errors.ConfigError(f"--density is the share that pruning keeps: {', '.join(prunes)}; not {args.how}")
    density = DENSITY if args.density is None else args.density
    combine.check(name, count, weights, density)
    if args.rank is not None and (args.of != "weights" or args.rank < 1):
        raise errors.ConfigError("--rank N, at least 1, cuts what --of weights gives to products of that rank")
    return How(args.how, weights, density, jax.random.key(args.seed))


def opened(names: list[str], changes: list[str] | None = None) -> list[artefact.Tuned]:
    """The runs, their base held once. Raises CheckpointError where it is not the same for all.

    changes: overrides of each one's config.
    """
    runs: list[artefact.Tuned] = []
    for name in names:
        runs.append(artefact.open_run(name, changes, beside=runs[0] if runs else None))
        first, base = runs[0].loaded.base, runs[-1].loaded.base
        if base.digest != first.digest or runs[-1].parts.config.model.head != runs[0].parts.config.model.head:
            raise errors.CheckpointError(
                f"{name} is of {base.name} (digest {base.digest[:16]}) for {runs[-1].parts.config.objective.name}, and "
                f"{names[0]} of {first.name} (digest {first.digest[:16]}) for {runs[0].parts.config.objective.name}; "
                "runs combine on one base and objective"
            )
    return runs


def write(output: Path, runs: list[artefact.Tuned], made: Made, about: dict[str, Any]) -> schema.Config:
    """The run folder: the config of the first run with the methods that came out, the adapter, and what was merged."""
    first = runs[0].parts
    specs = made.specs if len(made.specs) > 1 else made.specs[0]
    config = load.check({**first.config.model_dump(mode="json"), "method": specs, "output_dir": str(output)})
    tokenize = lambda text: list(first.tokenizer(text)["input_ids"])  # noqa: E731
    kept = [adapter.at_layers(state, artefact.cuts(first)) for state in made.state]
    methods = [_built(spec, state, tokenize) for spec, state in zip(made.specs, kept, strict=True)]
    names = [m.name for m in methods]
    keys = [f"{i}:{n}" for i, n in enumerate(names)]
    train, state = (v[0] if len(v) == 1 else dict(zip(keys, v, strict=True)) for v in (made.train, made.state))
    combined.check_heads(runs)
    info = {
        "method": config.method, "name": "+".join(names), "head": config.model.head, "seed": config.seed, "step": 0,
        "num_labels": first.model_config.num_labels, "labels": list(config.data.labels or []),
        "cuts": list(chain(*methods).cuts(first.model_config.num_layers)),
    }  # fmt: skip
    whole = {p for tree in made.train for p, x in tree.items() if operators.is_array(x)}
    fresh = {p: paths.get(runs[0].loaded.params, p) for p in runs[0].loaded.fresh if p not in whole}
    folder.begin(config)
    adapter.save(output / "adapter", {"train": train, "state": state, "fresh": fresh}, runs[0].loaded.base, info)
    folder.write_json(output / "summary.json", {"merged": about, "base": runs[0].loaded.base._asdict()})
    return config


def _built(spec: dict[str, Any], state: Any, tokenize: Callable[[str], list[int]]) -> Method:
    """The method of this description and state, whose paths say layers (`adapter.at_layers`)."""
    return registry.build(registry.with_kept(spec, lambda: state), tokenize, adapter.trained)


def _named(config: schema.Config) -> str:
    specs = combined.specs_of(config)
    return " and ".join(f"{s['name']} of rank {s['rank']}" if "rank" in s else s["name"] for s in specs)
