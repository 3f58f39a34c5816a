"""Several runs on one base combined into one adapter: on what their adapters hold, or on how the weights changed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.config import schema
from tunejax.core import combine, errors, method, paths
from tunejax.core.combine import Factors, Product
from tunejax.methods import registry
from tunejax.recipes import adapter, artefact

STACKED = "cat"
"""The exact weighted sum: of products by their ranks side by side, of anything else as "linear"."""
PLAIN, WHOLE = "lora", "full"
"""Methods that keep changes of kernels as products, and that keep whole values."""


Called = tuple[str, dict[str, Any]]
"""A method's name and every argument, defaults included: runs may spell one method in several ways."""


class How(NamedTuple):
    """How changes are made one: as of `combine.combine`, or `STACKED`."""

    name: str
    weights: list[float]
    density: float
    key: Any

    def of(self, path: str, changes: Sequence[Any], taking: Sequence[int]) -> Any:
        """The changes at ``path`` of the runs ``taking`` part, as one."""
        weights, name = [self.weights[i] for i in taking], "linear" if self.name == STACKED else self.name
        return combine.combine(changes, weights, name, **self.options(path))

    def options(self, path: str) -> dict[str, Any]:
        """What `combine` is told besides. Each path draws by itself, and each layer is pruned by itself."""
        return {"density": self.density, "key": method.path_key(self.key, path), "each": path.startswith("layers/")}


class Made(NamedTuple):
    """What comes out. specs: descriptions of its methods; train, state: a tree for each of them."""

    specs: list[dict[str, Any]]
    train: list[Any]
    state: list[Any]


def of_adapters(runs: list[artefact.Tuned], how: How) -> Made:
    """What the runs trained, array by array, as HF PEFT combines adapters. Raises ConfigError where arrays differ."""
    specs = [specs_of(r.parts.config) for r in runs]
    if len({len(s) for s in specs}) > 1 or len({artefact.cuts(r.parts) for r in runs}) > 1:
        raise errors.ConfigError(
            f"the runs are of {', '.join(r.parts.method.name for r in runs)}, which have no arrays in common to "
            "combine; --of weights combines what they made of the base"
        )
    if len(specs[0]) > 1 and any(len(r.parts.method.parts) != len(specs[0]) for r in runs):
        raise errors.ConfigError("a preset in a list of methods is several of them; give the list in its parts")
    out = Made([], [], [])
    for i, ours in enumerate(zip(*specs, strict=True)):
        train, state = ([part(r, t, i) for r in runs] for t in ("train", "state"))
        called = [registry.resolved(s) for s in ours]
        products = [module.PRODUCT for _, _, module in called if hasattr(module, "PRODUCT")]
        if len(products) == len(runs):
            spec, arrays = _products(products, [a for _, a, _ in called], train, state, how)
            kept: Any = {}
        else:
            starts = [part(r, "start", i) for r in runs]
            same = [(name, arguments) for name, arguments, _ in called]
            spec, arrays, kept = dict(ours[0]), _plain(same, starts, train, how), _same(same, state, "state")
        for field, value in zip(out, (spec, arrays, kept), strict=True):
            field.append(value)
    return out


def _products(
    products: list[Product], arguments: list[dict[str, Any]], train: list[Any], state: list[Any], how: How
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(description, arrays by site) of the one product of each kernel's products."""
    parts: dict[str, dict[int, Factors]] = {}
    for i, (product, t, s) in enumerate(zip(products, train, state, strict=True)):
        for p, arrays in t.items():
            parts.setdefault(p, {})[i] = product.factors({**arrays, **s.get(p, {})})
    ranks = [max(f[i].a.shape[-1] for f in parts.values() if i in f) for i in range(len(products))]
    if how.name != STACKED and len(set(ranks)) > 1:
        raise errors.ConfigError(f"{how.name} adds factors of one rank, found {ranks}: --how {STACKED} stacks them")
    rank = sum(ranks) if how.name == STACKED else ranks[0]
    scales = [p.scale(a) for p, a in zip(products, arguments, strict=True)]
    made = {p: _product(p, found, scales, rank, how) for p, found in parts.items()}
    trained = list(dict.fromkeys(a.get("layers") for a in arguments))
    if len(trained) > 1:
        raise errors.ConfigError(
            f"the runs train other layers ({', '.join(map(str, trained))}); --of weights combines them"
        )
    layers = {"layers": trained[0]} if trained[0] is not None else {}
    spec = {**products[0].plain(rank), "targets": [f"/{p}" for p in made], **layers}
    return spec, {p: f._asdict() for p, f in made.items()}


def _product(path: str, found: Mapping[int, Factors], scales: list[float], rank: int, how: How) -> Factors:
    weights, own = [how.weights[i] for i in found], [scales[i] for i in found]
    if how.name == STACKED:
        return combine.stacked_ranks(
            list(found.values()), [w * s for w, s in zip(weights, own, strict=True)], rank=rank
        )
    return combine.combined_factors(list(found.values()), own, weights, how.name, **how.options(path))


def _plain(methods: Sequence[Called], starts: list[Any], train: list[Any], how: How) -> Any:
    """Other arrays, as changes from where they began."""
    start = _same(methods, starts, "start (their seeds)")
    everyone = range(len(train))

    def one(where: Any, first: Any, *ends: Any) -> Any:
        path = next((k.key for k in where if str(k.key).startswith("layers/")), str(where[0].key))
        return first + how.of(path, [x - first for x in ends], everyone)

    return jax.tree.map_with_path(one, start, *train)


def _same(methods: Sequence[Called], trees: list[Any], what: str) -> Any:
    """The one tree that all of ``trees`` are. Raises ConfigError where they or the methods differ."""
    first = trees[0]
    if any(m != methods[0] for m in methods) or not all(equal(first, t) for t in trees):
        found = ", ".join(str({"name": name, **arguments}) for name, arguments in methods)
        raise errors.ConfigError(
            f"{methods[0][0]}: the runs differ in what they are or in their {what} ({found}), so their arrays do "
            "not combine; --of weights does, for methods that merge into the base"
        )
    return first


def equal(a: Any, b: Any) -> bool:
    """Whether two trees hold the same arrays under the same names."""
    ours, theirs = adapter.named(a), adapter.named(b)
    return ours.keys() == theirs.keys() and all(np.array_equal(x, theirs[k]) for k, x in ours.items())


def rewritten(run: artefact.Tuned) -> dict[str, Any]:
    """What the method rewrote of the base, by path; holes, whose values train, left out."""
    before = paths.flatten(run.loaded.params)
    return {p: x for p, x in paths.flatten(run.base).items() if x is not None and x is not before[p]}


def check_heads(runs: list[artefact.Tuned]) -> None:
    """Raises ConfigError where a head that the checkpoint lacks, and that stayed frozen, is not one in all runs."""
    frozen = {p for r in runs for p in r.loaded.fresh if paths.get(r.base, p) is not None}
    for path in sorted(frozen):
        first, *others = (paths.get(r.loaded.params, path) for r in runs)
        if not all(np.array_equal(first, x) for x in others):
            raise errors.ConfigError(
                f"the runs have heads of their own ({path}, of other seeds), and nothing of the base can be each run's "
                "own: train them with one seed, or let the head train"
            )


def of_weights(runs: list[artefact.Tuned], how: How, rank: int | None) -> Made:
    """The changes that the runs made to the base, whatever made them, as task arithmetic, TIES and DARE speak of them.

    Kept as whole values of what changed; where ``rank`` is given, kernels of the stack as products of that rank.

    Raises:
      ConfigError: a method rewrote the base before it trained, or adds to it what it has not.
      NotLinear: a method that cannot be merged.
    """
    changes = [_changes(r) for r in runs]
    base = joined(paths.flatten(runs[0].loaded.params), paths.segments(runs[0].loaded.params))
    made = {}
    for path in dict.fromkeys(p for c in changes for p in c):
        taking = [i for i, c in enumerate(changes) if path in c]
        made[path] = how.of(path, [changes[i][path] for i in taking], taking)
    thin = {p for p in made if rank is not None and p.startswith("layers/") and p.endswith("kernel")}
    out = Made([], [], [])
    if thin and rank is not None:
        product: Product = registry.find(PLAIN)[1].PRODUCT
        out.specs.append({**product.plain(rank), "targets": [f"/{p}" for p in made if p in thin]})
        out.train.append({p: combine.truncated(made[p], rank)._asdict() for p in made if p in thin})
    whole = {p: jnp.asarray(base[p], jnp.float32) + x for p, x in made.items() if p not in thin}
    if whole:
        out.specs.append({"name": WHOLE, "targets": [f"/{p}" for p in whole]})
        out.train.append(whole)
    return out._replace(state=[{} for _ in out.specs])


def _changes(run: artefact.Tuned) -> dict[str, jax.Array]:
    """path -> how far the run moved it, of all that it moved; as if the stack were one segment."""
    edited = rewritten(run)
    if edited:
        raise errors.ConfigError(
            f"{run.parts.method.name} rewrote {next(iter(edited))} of the base before it trained, which would count as "
            "a change once for each run: combine --of adapters"
        )
    # A merge is rounded to the base's type, and what a run changed is small beside what it changed.
    before = {p: None if x is None else x.astype(jnp.float32) for p, x in paths.flatten(run.loaded.params).items()}
    base = {p: None if x is None else before[p] for p, x in paths.flatten(run.base).items()}
    after = paths.flatten(run.parts.method.merge(paths.unflatten(base), run.train, run.state))
    moved = {p for p, x in after.items() if x is not before[p]}
    added = [p for p in moved if before[p] is None]
    if added:
        raise errors.ConfigError(
            f"{run.parts.method.name} adds {added[0]}, which the base has not: combine --of adapters"
        )
    ends = {p.split("/", 2)[-1] for p in moved if p.startswith("layers/")}
    touched = {p for p in before if p in moved or (p.startswith("layers/") and p.split("/", 2)[-1] in ends)}
    differences = {p: after[p].astype(jnp.float32) - before[p] for p in touched}
    return joined({p: differences[p] for p in before if p in touched}, paths.segments(run.loaded.params))


def joined(flat: Mapping[str, Any], segments: list[paths.Segment]) -> dict[str, Any]:
    """Leaves by path with the stack's segments joined to one."""
    out: dict[str, Any] = {p: x for p, x in flat.items() if not p.startswith("layers/")}
    for rest in dict.fromkeys(p.split("/", 2)[-1] for p in flat if p.startswith("layers/")):
        leaves = [flat[f"layers/{s.name}/{rest}"] for s in segments]
        out[f"layers/0/{rest}"] = None if leaves[0] is None else jnp.concatenate(leaves)
    return out


def specs_of(config: schema.Config) -> list[dict[str, Any]]:
    """The descriptions of a config's methods."""
    return config.method if isinstance(config.method, list) else [config.method]


def part(run: artefact.Tuned, what: str, i: int) -> Any:
    """Train, state or start of the i-th description of the run's methods; of all where one stands for a chain."""
    if what == "start":
        tree = run.parts.method.init(jax.random.key(run.parts.config.seed), run.loaded.params).train
    else:
        tree = getattr(run, what)
    parts = run.parts.method.parts
    return tree[method.keys(parts)[i]] if parts and len(parts) == len(specs_of(run.parts.config)) else tree
