"""Masks over units: an operator that lets through what is kept, and where a model's masks stand.

    y = (x · in_mask) W · out_mask         of a norm's scale: out_mask · norm(x), with the statistics over kept entries

What is masked counts for nothing, so the arrays may be cut there and the function stays the same (`models/cut.py`). A
mask may carry a probe: zeros whose gradient says how much each unit matters.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, operators, paths, units
from tunejax.core.paths import Params

PROBE = 2.0**-10
"""Probes are scaled by it, so that their gradients weigh nothing in the norm that gradients are clipped by."""

SCORES = "importance"
"""Under this name a method keeps, in its state, the scores that its masks follow: dimension -> [rows, units]."""

COUNTS = "counts"
"""Under this name a method keeps in its state how many units each size that it offers keeps: dimension -> [sizes]."""

TARGET = "target"
"""Under this name a method keeps in its state how many units its masks come down to: dimension -> int scalar."""


@operators.operator
class Masked(operators.Above):
    """(in_mask · x) base, then · out_mask; where a norm's scale stands, `over` says what it does there.

    base: kernel [..., in, out], or an operator that stands for one; or a norm's scale [..., out].
    in_mask [..., in], out_mask [..., out]: float32, 0 or 1; None is 1. in_seen, out_seen: see `observed`.
    """

    base: Any
    in_mask: jax.Array | None = None
    out_mask: jax.Array | None = None
    in_seen: jax.Array | None = None
    out_seen: jax.Array | None = None

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        out = operators.apply(self.base, through(x, self.in_mask, self.in_seen), bias)
        return through(out, self.out_mask, self.out_seen)

    def dense(self) -> jax.Array:
        """diag(in_mask) base diag(out_mask). Raises NotLinear for a norm, whose statistics no scale can change."""
        out = operators.dense(self.base)
        if self.out_mask is not None and self.out_mask.shape == out.shape:
            raise errors.NotLinear("a norm over kept entries is no plain norm; cut the model: tunejax shrink")
        out = out if self.in_mask is None else out * self.in_mask[..., :, None].astype(out.dtype)
        return out if self.out_mask is None else out * self.out_mask[..., None, :].astype(out.dtype)

    def dense_bias(self, bias: jax.Array) -> jax.Array:
        """bias · out_mask."""
        inner = operators.dense_bias(self.base, bias)
        return inner if self.out_mask is None else inner * self.out_mask.astype(inner.dtype)


def through(x: jax.Array, mask: jax.Array | None, seen: jax.Array | None = None) -> jax.Array:
    """x [..., n] times a mask [n]."""
    x = x if seen is None else observed(x, seen)
    return x if mask is None else x * mask.astype(x.dtype)


@jax.custom_vjp
def observed(x: jax.Array, probe: jax.Array) -> jax.Array:
    """x [..., n] as it is; the "gradient" of probe [n] is the sum of squares of each entry over all of x's rows.

    So a statistic of the forward pass is summed as gradients are: over layers' scans, micro-batches and devices.
    """
    return x


def _observe(x: jax.Array, probe: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, x


def _squares(x: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    return grad, jnp.square(x.astype(jnp.float32)).sum(tuple(range(x.ndim - 1)))


observed.defvjp(_observe, _squares)


def put(params: Params, masks: Mapping[str, jax.Array], seen: Mapping[str, jax.Array] | None = None) -> Params:
    """``params`` with masks (dimension -> float32 [rows, units]) standing where they act.

    seen: probes of `observed`, shaped as the masks of the same dimension. Depth has none.
    """
    seen, flat = seen or {}, paths.flatten(params)
    out: dict[paths.Path, Any] = {}
    starts = {s.name: s for s in paths.segments(params)}

    def rows(values: jax.Array | None, path: str, layered: bool) -> jax.Array | None:
        segment = starts.get(path.split("/")[1]) if path.startswith("layers/") else None
        if values is None or segment is None:
            return None if values is None else values[0]
        if layered:
            return values[segment.start : segment.start + segment.size]
        return jnp.broadcast_to(values, (segment.size, values.shape[1]))

    for name, mask in masks.items():
        d = units.DIMENSIONS[name]
        for path, leaf in flat.items():
            leaf = out.get(path, leaf)
            for patterns, side, axis in ((d.read, "in", -2), (d.normed, "out", -1)):
                if leaf is not None and any(paths.matches(p, path) for p in patterns):
                    ends = {"mask": _ends(mask, leaf, axis, 1.0), "seen": _ends(seen.get(name), leaf, axis, 0.0)}
                    out[path] = Masked(leaf, **{f"{side}_{k}": rows(x, path, d.layered) for k, x in ends.items()})
        if name == "depth":
            out.update(_gates(params, mask[0]))
    return paths.replace(params, out)


def _ends(values: jax.Array | None, leaf: Any, axis: int, fill: float) -> jax.Array | None:
    """Values a unit [rows, units] -> [rows, entries of the leaf's axis]; those that an operator adds get ``fill``."""
    width = operators.innermost(leaf).shape[axis]
    return None if values is None else units.spread(values, width, leaf.shape[axis] - width, fill)


def taken_off(params: Params) -> Params:
    """``params`` without the masks of `put`: no `Masked` stands outermost anywhere, and every gate is empty."""
    flat = paths.flatten(params)
    for path, leaf in flat.items():
        while isinstance(leaf, Masked):
            leaf = leaf.base
        flat[path] = leaf
    flat.update({units.GATE.format(s.name): None for s in paths.segments(params)})
    return paths.unflatten(flat)


def any_stands(params: Params) -> bool:
    """Whether a mask of `put` stands outermost anywhere."""
    gates = [paths.get(params, units.GATE.format(s.name)) for s in paths.segments(params)]
    return any(isinstance(x, Masked) for x in paths.flatten(params).values()) or any(g is not None for g in gates)


def scores(state: Any) -> dict[str, Any]:
    """The scores of the last method of a chain that keeps some; empty where none does."""
    return _by_dimension(state, SCORES)


def counts(state: Any) -> dict[str, Any]:
    """Dimension -> int [sizes], how many units each size keeps, of a method that offers several; empty where none does.

    Of each size those are kept that score highest, see `scores`.
    """
    return _by_dimension(state, COUNTS)


def targets(state: Any) -> dict[str, Any]:
    """Dimension -> how many units are left at the end, in a row, of a method that masks ever more; else empty."""
    return _by_dimension(state, TARGET)


def _by_dimension(state: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(state, Mapping):
        for key, value in state.items():
            own = key == name and isinstance(value, Mapping) and set(value) <= set(units.DIMENSIONS)
            found.update(value if own else _by_dimension(value, name))
    return found


def _gates(params: Params, mask: jax.Array) -> dict[str, Any]:
    out = {}
    for s in paths.segments(params):
        path, own = units.GATE.format(s.name), mask[s.start : s.start + s.size]
        before = paths.get(params, path)
        out[path] = own if before is None else before * own
    return out


def over(scale: Any) -> tuple[Any, jax.Array | None, jax.Array | None]:
    """What stands at a norm's scale -> (the scale [dim], mask [dim] or None, probe or None)."""
    mask = seen = None
    while isinstance(scale, Masked):
        own = scale.out_mask
        mask = own if mask is None else mask if own is None else mask * own
        seen = scale.out_seen if seen is None else seen
        scale = scale.base
    return scale, mask, seen
