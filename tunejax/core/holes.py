"""Leaves that train whole, or from where they stand: what methods that select them share."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tunejax.core import errors, operators, paths
from tunejax.core.method import Start
from tunejax.core.paths import Params, Path


def moved(name: str, leaves: Mapping[Path, Any]) -> Start:
    """The Start that moves these leaves into ``train`` as float32 and leaves holes.

    Raises:
      TargetError: some leaf is an operator (wrapped by a method before) or holds no real numbers.
    """
    check_plain(name, leaves)
    return Start(dict.fromkeys(leaves), {p: x.astype(jnp.float32) for p, x in leaves.items()})


def check_plain(name: str, leaves: Mapping[Path, Any]) -> None:
    """Raises TargetError where some leaf is an operator (wrapped by a method before) or holds no real numbers."""
    stuck = [p for p, x in leaves.items() if not operators.is_array(x)]
    if stuck:
        raise errors.TargetError(
            f"{name} targets {stuck[0]} (and {len(stuck) - 1} more), which a method before it wraps; put {name} first"
        )
    integers = [p for p, x in leaves.items() if not jnp.issubdtype(x.dtype, jnp.floating)]
    if integers:
        raise errors.TargetError(f"{name} targets {integers[0]} of type {leaves[integers[0]].dtype}; it cannot train")


def kernels(name: str, params: Params, targets: str | list[str]) -> dict[Path, Any]:
    """The kernels that ``targets`` select, to be rewritten. Raises TargetError: what matched is no plain kernel."""
    sites = paths.select(params, targets).leaves
    check_plain(name, sites)
    paths.check_kernels(name, sites)
    return sites
