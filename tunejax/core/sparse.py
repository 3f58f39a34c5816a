"""Sparse differences: what methods share that train a few entries of the parameters, found while training.

The base stays as it is; ``train`` holds a dense difference by path, and ``state`` says which of its entries count, and
from where: the values of a step are

    theta0 + mask * (train - origin)

A method cannot put ``train`` back (it belongs to the optimiser), so rewinding sets ``origin`` to where it stands.
Weight decay would pull ``train``, not ``train - origin``, to zero: leave it off.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, holes, paths
from tunejax.core.paths import Params, Path

Arrays = Mapping[Path, jax.Array]


def zeros(name: str, params: Params, targets: str | list[str], layers: str | int | None) -> dict[Path, jax.Array]:
    """A float32 zero for each entry of the targeted leaves.

    Raises:
      TargetError: nothing matched, or what matched is an operator or holds no real numbers.
    """
    leaves = paths.select(params, targets, layers=layers).leaves
    holes.check_plain(name, leaves)
    return {p: jnp.zeros(x.shape, jnp.float32) for p, x in leaves.items()}


def fresh(train: Arrays) -> dict[str, Any]:
    """The state before a mask is found: every entry counts, from zero, after no updates."""
    ones = {p: jnp.ones(x.shape, bool) for p, x in train.items()}
    return {"updates": jnp.zeros((), jnp.int32), "mask": ones, "origin": jax.tree.map(jnp.zeros_like, dict(train))}


def difference(train: Arrays, state: Mapping[str, Any]) -> dict[Path, jax.Array]:
    """mask * (train - origin)."""
    return {p: jnp.where(state["mask"][p], x - state["origin"][p], 0.0) for p, x in train.items()}


def added(params: Params, differences: Arrays) -> Params:
    """``params`` plus the differences: summed in float32, rounded once to each leaf's type."""
    old = {p: paths.get(params, p) for p in differences}
    new = {p: (x.astype(jnp.float32) + differences[p]).astype(x.dtype) for p, x in old.items()}
    return paths.replace(params, new)


def greatest(scores: Arrays, density: float) -> dict[Path, jax.Array]:
    """A mask of the ``density`` part of all entries together that score highest: at least one, ties by order."""
    total = sum(x.size for x in scores.values())
    flat = jnp.concatenate([x.ravel() for x in scores.values()])
    chosen = jax.lax.top_k(flat, max(1, round(density * total)))[1]
    mask = jnp.zeros((total,), bool).at[chosen].set(True)
    out, start = {}, 0
    for p, x in scores.items():
        out[p] = mask[start : start + x.size].reshape(x.shape)
        start += x.size
    return out


def check(name: str, density: float, mask_steps: int) -> None:
    """Raises ConfigError for a density outside (0, 1] or fewer than one step to find the mask in."""
    if not 0.0 < density <= 1.0:
        raise errors.ConfigError(f"{name}: density is {density}; it must lie in (0, 1]")
    if mask_steps < 1:
        raise errors.ConfigError(f"{name}: mask_steps is {mask_steps}; it must be at least 1")
