"""The physical cut: masked parameters become a smaller model, the same function, in a shape that a config can say."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, masked, operators, paths, units
from tunejax.core.paths import Params, Path
from tunejax.models.config import ModelConfig
from tunejax.models.families import registry

JOIN = "/layers/*/{attention,mlp}/join"
"""Slots that no checkpoint has."""
Masks = Mapping[str, Any]
"""Dimension (`core.units`) -> bool [rows, units]: what is kept."""


def sizes(config: ModelConfig) -> dict[str, int]:
    """Dimension -> units in a row of its masks."""
    return {
        "heads": config.num_kv_heads, "mlp": config.mlp_dim, "depth": config.num_layers, "hidden": config.embed_dim
    }  # fmt: skip


def masks(bound: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The masks that stand in bound parameters (`core.masked.put`), one for each dimension that is masked.

    Raises:
      ConfigError: as `check_places`.
    """
    check_places(bound)
    out: dict[str, np.ndarray] = {}
    flat = paths.flatten(bound)
    for name, count in sizes(config).items():
        d = units.DIMENSIONS[name]
        if name == "depth":
            gates = [paths.get(bound, units.GATE.format(s.name)) for s in paths.segments(bound)]
            if all(g is not None for g in gates):
                out[name] = np.concatenate([np.asarray(g) for g in gates])[None] > 0
            continue
        pattern = (d.normed or d.read)[0]
        found = [_mask(x, d) for p, x in flat.items() if p.startswith("layers/") and paths.matches(pattern, p)]
        whole = [m for m in found if m is not None]
        if whole:
            stacked = np.concatenate(whole)
            stacked = stacked.reshape(len(stacked), count, -1)[..., 0]
            out[name] = stacked if d.layered else stacked[:1]
    return out


def check_places(bound: Params) -> None:
    """Whether all masks stand where a cut can follow them; bound parameters may be shapes.

    Raises:
      ConfigError: another method wraps a masked kernel from outside, so that what is masked still counts; or one stands
        where a branch joins the residual, which no smaller model can have.
    """
    for path, leaf in paths.flatten(bound).items():
        if leaf is not None and paths.matches(JOIN, path):
            raise errors.ConfigError(
                f"{path}: a method acts where this branch joins the residual, and no checkpoint has anything there. "
                "Cut without it, and train it on the smaller model"
            )
        inner = leaf
        while isinstance(inner, masked.Masked):
            inner = inner.base
        while operators.is_operator(inner):
            if isinstance(inner, masked.Masked):
                raise errors.ConfigError(f"{path}: another method stands above the mask; name the one that masks last")
            inner = operators.beneath(inner)


def _mask(leaf: Any, d: units.Dimension) -> np.ndarray | None:
    """The mask [layers, width] of a stacked leaf, or None."""
    out = None
    while isinstance(leaf, masked.Masked):
        own = leaf.out_mask if d.normed else leaf.in_mask
        if own is not None:
            out = np.asarray(own) > 0 if out is None else out & (np.asarray(own) > 0)
        leaf = leaf.base
    width = operators.innermost(leaf).shape[-1 if d.normed else -2]
    return None if out is None else out[..., :width]  # an operator may have made the kernel wider


def bare(bound: Params) -> Params:
    """Bound parameters as plain arrays, without their masks over units: what `cut` takes.

    Raises:
      NotLinear: some operator has no plain kernel.
    """
    return operators.densify(masked.taken_off(bound))


def cut(
    params: Params, masks: Masks, config: ModelConfig, scores: Mapping[str, Any] | None = None
) -> tuple[Params, ModelConfig]:
    """The smaller model: its parameters, all layers in one segment, and its config.

    Invariant: its logits equal those of ``params`` with the masks in place (`core.masked.put`).

    Args:
      params: plain arrays (see `bare`), in any segments.
      masks: what is kept; a dimension that is not named stays whole.
      config: of the params.
      scores: dimension -> importance [rows, units]: kept units are sorted by it, the greatest first, so that what is
        left can be cut again from its end. Layers keep their order. Without it, all keep their order.

    Raises:
      ConfigError: a mask of another shape, that keeps nothing, or whose rows keep different numbers of units.
    """
    full = sizes(config)
    units.check(masks, "cut")
    kept = {name: _indices(name, masks[name], config, (scores or {}).get(name)) for name in masks}
    layers = kept["depth"][0] if "depth" in kept else np.arange(config.num_layers)
    out: dict[Path, Any] = {}
    for path, leaf in _joined(params).items():
        in_stack = path.startswith("layers/")
        x = leaf if leaf is None or not in_stack else leaf[jnp.asarray(layers)]
        for axis, name in units.axes_of(path) if leaf is not None else ():
            if name in kept:
                rows = kept[name][layers] if units.DIMENSIONS[name].layered else kept[name]
                x = _taken(x, rows, axis, full[name])
        out[path] = x
    return paths.unflatten(out), smaller(config, {name: x.shape[1] for name, x in kept.items()})


def _indices(name: str, mask: Any, config: ModelConfig, score: Any) -> np.ndarray:
    """Kept units, int [rows, kept]."""
    mask = np.asarray(mask) > 0
    shape = (config.num_layers if units.DIMENSIONS[name].layered else 1, sizes(config)[name])
    if mask.shape != shape:
        raise errors.ConfigError(f"cut: the mask of {name!r} has shape {mask.shape}, expected {shape}")
    counts = mask.sum(1)
    if counts.min() < 1 or counts.min() != counts.max():
        raise errors.ConfigError(
            f"cut: the mask of {name!r} keeps {counts.tolist()} units by layer; a config has one number for all"
        )
    order = np.argsort(~mask, axis=1, kind="stable")[:, : counts[0]]
    if score is None or name == "depth":
        return order
    by = np.argsort(-np.take_along_axis(np.asarray(score), order, 1), axis=1, kind="stable")
    return np.take_along_axis(order, by, 1)


def _taken(x: jax.Array, rows: np.ndarray, axis: int, count: int) -> jax.Array:
    """The entries of these units along an axis; rows [1 or layers, kept]."""
    size = x.shape[axis] // count
    entries = jnp.asarray((rows[:, :, None] * size + np.arange(size)).reshape(len(rows), -1))
    if len(rows) == 1:
        return jnp.take(x, entries[0], axis=axis)
    return jax.vmap(lambda one, at: jnp.take(one, at, axis=axis))(x, entries)


def _joined(params: Params) -> dict[Path, Any]:
    """The leaves by path, with all segments of the stack in one."""
    parts = [paths.flatten(params["layers"][s.name]) for s in paths.segments(params)]
    out = {p: x for p, x in paths.flatten(params).items() if not p.startswith("layers/")}
    for path, first in parts[0].items():
        out[f"layers/0/{path}"] = None if first is None else jnp.concatenate([p[path] for p in parts])
    return out


def smaller(config: ModelConfig, kept: Mapping[str, int]) -> ModelConfig:
    """``config`` with ``kept`` units of each dimension; whole where it is not named."""
    changes: dict[str, Any] = {}
    if "heads" in kept:
        group = config.num_heads // config.num_kv_heads
        changes |= {"num_kv_heads": kept["heads"], "num_heads": kept["heads"] * group}
    names = {"mlp": "mlp_dim", "depth": "num_layers", "hidden": "embed_dim"}
    changes |= {names[name]: count for name, count in kept.items() if name in names}
    return dataclasses.replace(config, **changes)


def check(config: ModelConfig, head: str) -> None:
    """Raises ConfigError where the family's config.json cannot say these sizes, or `transformers` refuses them."""
    wanted = {f: getattr(config, f) for f in ("num_heads", "num_kv_heads", "head_dim", "mlp_dim", "embed_dim")}
    family = registry.get(config.family)
    try:
        written = family.write_config(config, head)
        read = family.read_config(written)
    except errors.CheckpointError as e:
        raise errors.ConfigError(f"a {config.family} of {config.num_heads} heads cannot be saved: {e}") from None
    wrong = [f"{k} {v} (it would be read as {getattr(read, k)})" for k, v in wanted.items() if getattr(read, k) != v]
    if "head_dim" not in written and config.embed_dim % config.num_heads:
        wrong.append(f"embed_dim {config.embed_dim} of {config.num_heads} heads (transformers wants a multiple)")
    if wrong:
        raise errors.ConfigError(
            f"config.json of a {config.family} cannot say {', '.join(wrong)}: there a head is as wide as embed_dim / "
            f"num_heads. Keep all heads, or the same part of heads and hidden"
        )


def fits(config: ModelConfig, head: str, kept: Mapping[str, int]) -> bool:
    """Whether `check` lets pass what keeps so many units, the other sizes as they are."""
    try:
        check(smaller(config, kept), head)
    except errors.ConfigError:
        return False
    return True


def head_counts(config: ModelConfig, head: str) -> tuple[int, ...]:
    """How many key/value heads of this width the family's config.json can say, the other sizes as they are."""
    return tuple(k for k in range(1, config.num_kv_heads + 1) if fits(config, head, {"heads": k}))


@functools.cache
def writable(config: ModelConfig, head: str) -> Callable[[Mapping[str, int]], bool]:
    """`fits` of a model, that remembers: a search for a budget asks of the same heads and hidden entries often."""
    known: dict[tuple[tuple[str, int], ...], bool] = {}

    def ask(kept: Mapping[str, int]) -> bool:
        key = tuple(sorted(kept.items()))
        if key not in known:
            known[key] = fits(config, head, kept)
        return known[key]

    return ask
