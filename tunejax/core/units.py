"""What a network can be made smaller by, as data: dimensions, the units of each, and where their parameters lie.

A unit is what goes as a whole: a key/value head with the query heads that read it, an inner entry of the MLP, a layer,
an entry of the residual stream. A dimension's masks are arrays [rows, units]: a row a layer where each layer keeps
units of its own (heads, mlp), one row for the whole stack otherwise (depth, hidden). Every row keeps as many units,
since configs of Hugging Face know one width for all layers.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import errors, operators, paths
from tunejax.core.paths import Params, Path

Places = tuple[tuple[str, int], ...]
"""(pattern, axis counted from the end): the leaves that have the units along that axis, each unit a run of entries."""


class Dimension(NamedTuple):
    """One way to be smaller. layered: each layer has a row of masks of its own. places: what a unit's parameters are.

    read: the kernels that read the units, and nothing else does: masking their input masks the units.
    normed: scales of the norms that everything reads the units through; their statistics are over kept units alone.
    """

    layered: bool
    places: Places
    read: tuple[str, ...] = ()
    normed: tuple[str, ...] = ()


DIMENSIONS: dict[str, Dimension] = {
    "heads": Dimension(
        True, (("attention/{q,k,v}/{kernel,bias}", -1), ("attention/o/kernel", -2)), read=("attention/o/kernel",)
    ),
    "mlp": Dimension(True, (("mlp/{gate,up}/{kernel,bias}", -1), ("mlp/down/kernel", -2)), read=("mlp/down/kernel",)),
    "depth": Dimension(False, ()),
    "hidden": Dimension(
        False,
        (
            ("/{embed,positions,types}/table", -1),
            ("{norm,embed_norm}/{scale,bias}", -1),
            ("attention/{q,k,v}/kernel", -2),
            ("attention/o/{kernel,bias}", -1),
            ("mlp/{gate,up}/kernel", -2),
            ("mlp/down/{kernel,bias}", -1),
            ("/{head,classifier,pooler,mlm/dense}/kernel", -2),
            ("/{pooler,mlm/dense}/{kernel,bias}", -1),
        ),
        read=("/classifier/kernel",),
        normed=("{norm,embed_norm}/scale",),
    ),
}
"""Depth has no axis of its own: a layer is a row of the stack. A pooler has the width of what it reads."""

GATE = "layers/{}/gate"
"""The slot that a mask over layers fills, by segment."""


@functools.lru_cache(maxsize=4096)
def axes_of(path: Path) -> tuple[tuple[int, str], ...]:
    """(axis, dimension) of each axis of the leaf at ``path`` that has units along it; axes count from the end."""
    return tuple(
        (axis, name) for name, d in DIMENSIONS.items() for pattern, axis in d.places if paths.matches(pattern, path)
    )


def places(params: Params, name: str) -> Iterator[tuple[Path, Any, int]]:
    """(path, leaf, axis) of everything that has units of a dimension along an axis."""
    for path, leaf in paths.flatten(params).items():
        for axis, found in axes_of(path):
            if found == name and leaf is not None:
                yield path, leaf, axis


def sizes(params: Params, num_kv_heads: int | None = None) -> dict[str, int]:
    """Dimension -> how many units it has in a row. "heads" is left out where ``num_kv_heads`` is not told."""
    last = paths.flatten(next(iter(params["layers"].values())))
    out = {} if num_kv_heads is None else {"heads": num_kv_heads}
    *_, mlp, hidden = operators.innermost(last["mlp/down/kernel"]).shape
    return out | {"mlp": mlp, "depth": sum(s.size for s in paths.segments(params)), "hidden": hidden}


def rows(params: Params, name: str) -> int:
    """How many rows the masks of a dimension have."""
    return sum(s.size for s in paths.segments(params)) if DIMENSIONS[name].layered else 1


def check(names: Any, what: str) -> None:
    """Raises ConfigError where one of ``names`` is no dimension."""
    for name in names:
        if name not in DIMENSIONS:
            raise errors.ConfigError(f"{what}: no dimension {name!r}. {errors.did_you_mean(name, DIMENSIONS)}")


def spread(values: jax.Array, width: int, wider: int = 0, fill: float = 0.0) -> jax.Array:
    """Values a unit [..., units] -> values an entry [..., width], each unit a run of width / units entries.

    wider: how many entries come after them, which are no unit's and get ``fill``.
    """
    out = jnp.repeat(values, width // values.shape[-1], axis=-1)
    return jnp.pad(out, [(0, 0)] * (out.ndim - 1) + [(0, wider)], constant_values=fill) if wider else out


def gathered(values: jax.Array, units: int) -> jax.Array:
    """Sums over each unit's entries: [..., width] -> [..., units]."""
    return values.reshape(*values.shape[:-1], units, -1).sum(-1)


def squares(params: Params, name: str, units: int) -> jax.Array:
    """The sum of squares of each unit's parameters, float32 [rows, units]; of an operator, of its kernel.

    Raises:
      ConfigError: an operator that has no kernel, and was put around none.
    """
    if name == "depth":
        return _layer_squares(params)
    per_segment: dict[str, Any] = {}
    outside: Any = 0.0
    for path, leaf, axis in places(params, name):
        x = jnp.square(_values(path, leaf))
        front = path.startswith("layers/")
        other = tuple(i for i in range(1 if front else 0, x.ndim) if i != x.ndim + axis)
        found = gathered(x.sum(other), units)
        if front:
            segment = path.split("/")[1]
            per_segment[segment] = per_segment.get(segment, 0.0) + found
        else:
            outside = outside + found
    stacked = jnp.concatenate([per_segment[s.name] for s in paths.segments(params)])
    return stacked if DIMENSIONS[name].layered else (stacked.sum(0) + outside)[None]


def _layer_squares(params: Params) -> jax.Array:
    """Of each layer, the squares of the kernels that write to the residual stream: [1, layers]."""
    parts = []
    for s in paths.segments(params):
        written = [f"layers/{s.name}/{kernel}" for kernel in ("attention/o/kernel", "mlp/down/kernel")]
        parts.append(sum(jnp.square(_values(p, paths.get(params, p))).sum((-1, -2)) for p in written))
    return jnp.concatenate(parts)[None]


def _values(path: Path, leaf: Any) -> jax.Array:
    """The kernel that a leaf stands for, in float32; where there is none, that which its operator was put around."""
    x = leaf
    while operators.is_operator(x):
        try:
            x = x.dense()
        except errors.NotLinear:
            x = operators.beneath(x)
    if x is None:
        raise errors.ConfigError(
            f"{path}: {type(leaf).__name__} stands there, which has no kernel and is around none "
            f"({', '.join(operators.BENEATH)}), so its units have no magnitude; rank them by taylor or movement"
        )
    return x.astype(jnp.float32)


def parameters(params: Params, kept: Mapping[str, int], units: Mapping[str, int]) -> int:
    """How many parameters the model has left with ``kept`` units of each dimension (in a row); all where not named.

    params: arrays, operators or their ShapeDtypeStructs.
    """
    return sum(math.prod(shape) for _, shape in _left(params, kept, units))


def flops(params: Params, kept: Mapping[str, int], units: Mapping[str, int], length: int) -> int:
    """FLOPs a token of a forward pass over rows of ``length`` tokens with ``kept`` units of each dimension.

    Products alone, two for each multiply and add: the kernels of the stack, the vocabulary's head (the embedding table
    where there is no head of its own), and scores and mixing over all pairs.
    """
    shapes = dict(_left(params, kept, units))
    vocab, embed = shapes["embed/table"]
    own = [p for p in shapes if p in ("head/kernel", "classifier/kernel")]
    total = 0 if own else vocab * embed
    for path, shape in shapes.items():
        if not path.endswith("kernel"):
            continue
        if path.startswith(("layers/", "mlm/")) or (path == "head/kernel" and shape[-1] == vocab):
            total += math.prod(shape)
        if path.startswith("layers/") and path.endswith("attention/o/kernel"):
            total += 2 * length * math.prod(shape[:-1])
    return 2 * total


def _left(params: Params, kept: Mapping[str, int], units: Mapping[str, int]) -> Iterator[tuple[Path, list[int]]]:
    """(path, shape) of every parameter with ``kept`` units of each dimension; the stack stands as its first segment."""
    flat, depth = paths.flatten(params), sum(s.size for s in paths.segments(params))
    first = f"layers/{paths.segments(params)[0].name}/"
    for path, leaf in flat.items():
        if leaf is None or (path.startswith("layers/") and not path.startswith(first)):
            continue
        shape = list(operators.innermost(leaf).shape)
        for axis, name in axes_of(path):
            if name in kept:
                shape[axis] = shape[axis] // units[name] * kept[name]
        if path.startswith("layers/"):
            shape[0] = kept.get("depth", depth)
        yield path, shape
