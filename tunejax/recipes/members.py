"""The members of a section `many:`: their configs, what they share, and how their numbers come together and apart."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunejax.config import load, schema
from tunejax.core import errors, paths, rates
from tunejax.core.method import Method, keys
from tunejax.methods import registry
from tunejax.recipes import assemble, combined, folder, settings
from tunejax.train import many

SHORT = {"learning_rate": "train.learning_rate"}
"""What an entry may say instead of a whole key."""
DIFFER = ("seed", "train.learning_rate", "method", "output_dir", "many")
"""Keys in which members may differ."""
NOT_ELEMENTWISE = ("adafactor", "muon")
"""Optimisers whose moves depend on sizes of arrays, so that padding would change them."""


def configs_of(config: schema.Config) -> list[schema.Config]:
    """The config of each member, as its own run would have it, in ``output_dir/members/<i>``.

    Raises:
      ConfigError: an entry changes what all members share, or the config wants what only one run can have.
    """
    if config.train.early_stopping_patience or settings.keeps_best(config):
        raise errors.ConfigError("many: members stop together, at the last step: no early stop, no best checkpoint")
    raw = {**config.model_dump(mode="json"), "many": []}
    out = []
    for i, entry in enumerate(config.many):
        values = {SHORT.get(k, k): v for k, v in entry.items()}
        own = [k for k in ("output_dir", "many") if k in values]
        if own:
            raise errors.ConfigError(f"many.{i}: {own[0]} is not a member's own: its folder is OUTPUT_DIR/members/{i}")
        values["output_dir"] = f"{config.output_dir}/members/{i}"
        one = load.check(load.with_values(raw, values, f"many.{i}"), f"many.{i}")
        shared = [k for k in load.differences(one, config) if not k.startswith(DIFFER)]
        if shared:
            raise errors.ConfigError(
                f"many.{i}: {shared[0]} is shared by all members; they differ in seed, train.learning_rate and rank"
            )
        out.append(one)
    return out


def plan(configs: Sequence[schema.Config]) -> tuple[list[dict[str, Any]], list[list[dict[str, float]]]]:
    """(the methods with the largest ranks; for each member and method, what which array is multiplied by).

    Raises:
      ConfigError: methods that differ in more than rank and scale, or have no ranks that could differ.
    """
    specs = [combined.specs_of(c) for c in configs]
    largest: list[dict[str, Any]] = []
    factors: list[list[dict[str, float]]] = []
    if len({len(s) for s in specs}) > 1:
        raise errors.ConfigError("many: the members have different numbers of methods; they differ in numbers only")
    for each in zip(*specs, strict=True):
        called = [registry.resolved(s) for s in each]
        name, first, module = called[0]
        product = getattr(module, "PRODUCT", None)
        varies = product.varies if product is not None else ()
        for spec, (other, arguments, _) in zip(each[1:], called[1:], strict=True):
            differ = [k for k in first | arguments if first.get(k) != arguments.get(k) and k not in varies]
            differ += [rates.SCALE] if registry.scale_of(spec) != registry.scale_of(each[0]) else []
            if other != name or differ:
                what = f"{name} and {other}" if other != name else f"{name} with other {', '.join(differ)}"
                raise errors.ConfigError(
                    f"many: {what}; members of one program may differ in {', '.join(varies) or 'no argument of it'}"
                )
        most = max(range(len(each)), key=lambda i: called[i][1].get("rank", 0))
        largest.append(dict(each[most]))
        if product is None or all(a == first for _, a, _ in called):
            factors.append([{} for _ in each])
            continue
        scales = [product.scale(a) for _, a, _ in called]
        factors.append([dict.fromkeys(product.scaled, s / scales[most]) for s in scales])
        if configs[0].train.optim in NOT_ELEMENTWISE and len({a["rank"] for _, a, _ in called}) > 1:
            raise errors.ConfigError(f"many: ranks that differ are padded, which {configs[0].train.optim} would notice")
    return largest, [list(of) for of in zip(*factors, strict=True)]


def keyed(method: Method, factors: Sequence[Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The factors of one member by the keys of the chain's parts. Raises ConfigError: a preset among its methods."""
    if not any(factors):
        return {}
    if not method.parts:
        return {"": factors[0]}
    if len(method.parts) != len(factors):
        raise errors.ConfigError("many: a preset in a list of methods is several of them; give the list in its parts")
    return dict(zip(keys(method.parts), factors, strict=True))


def each_parts(parts: assemble.Parts, configs: Sequence[schema.Config]) -> list[assemble.Parts]:
    """The parts of each member; members of one description share their method, so that it compiles once."""
    made: dict[str, Method] = {}
    out = []
    for c in configs:
        key = repr(c.method)
        made[key] = made.get(key) or assemble.opened(c).method
        out.append(parts._replace(config=c, method=made[key]))
    return out


def steps(config: schema.Config, loaders: Any) -> int:
    """Optimiser steps. Raises ConfigError where seeds pack the rows into different numbers of batches."""
    found = {settings.total_steps(config, loader.train.plan.steps) for loader in loaders}
    if len(found) > 1:
        raise errors.ConfigError(f"many: the members' epochs have {sorted(found)} steps: set train.max_steps")
    return found.pop()


def drawn_heads(own: Sequence[assemble.Parts], loaded: assemble.Loaded) -> list[paths.Params]:
    """Of each member, the head that its seed draws; empty where all draw one, or the checkpoint has it."""
    seeds = {p.config.seed for p in own}
    if len(seeds) > 1 and own[0].config.model.random_init:
        raise errors.ConfigError("many: model.random_init draws the base from the seed, and one program has one base")
    if not loaded.fresh or len(seeds) == 1:
        return []
    by_seed = {s: assemble.load(next(p for p in own if p.config.seed == s)).params for s in seeds}
    return [{f: paths.get(by_seed[p.config.seed], f) for f in loaded.fresh} for p in own]


def log_of(out: Path, config: schema.Config, member: schema.Config, i: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are about one member, as its own run would have written them."""
    lines = []
    for row in folder.read_rows(out / "metrics.jsonl"):
        line: dict[str, Any] = many.of_member(row, i)
        if "learning_rate" in row:
            line["learning_rate"] = row["learning_rate"] * member.train.learning_rate / config.train.learning_rate
        lines.append(line)
    return lines


class Together:
    """The loaders of all members as one: batches [members, rows, length], or [rows, length] where all have the same."""

    def __init__(self, loaders: Sequence[Any]) -> None:
        self._distinct = list({id(x): x for x in loaders}.values())
        self._which = [next(i for i, d in enumerate(self._distinct) if d is x) for x in loaders]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batches = [next(x) for x in self._distinct]
        if len(batches) == 1:
            return batches[0]
        alike = {k: _padded([b[k] for b in batches]) for k in batches[0]}
        return {k: np.stack([found[i] for i in self._which]) for k, found in alike.items()}

    def get_state(self) -> list[Any]:
        """Where each of them stands."""
        return [x.get_state() for x in self._distinct]

    def set_state(self, states: list[Any]) -> None:
        """Goes on from there."""
        for x, s in zip(self._distinct, states, strict=True):
            x.set_state(s)


def _padded(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Arrays [rows, length, ...] at the greatest of their lengths; [rows] as they are."""
    if arrays[0].ndim == 1:
        return arrays
    length = max(x.shape[1] for x in arrays)
    # Zeros behind a row are padding: segment 0, weight 0.
    return [np.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]) for x in arrays]
