"""What a merge added, taken away again: merged parameters back to their base.

    base = merged - (merge(base) - base)        in float32, leaf by leaf

The base itself is needed: of a method such as DoRA, which divides by norms of the sum, the merged kernel alone does not
say what it was. Where nothing but the merge happened to the parameters this is the base, to rounding; otherwise what
else happened to them (another merge, further training) stays.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, operators, paths
from tunejax.core.method import Method, PyTree, apply_edits
from tunejax.core.paths import Leaf, Params, Path


def unmerge(
    merged: Params,
    params: Params,
    method: Method,
    train: PyTree,
    state: PyTree,
    edits: Mapping[Path, Leaf | None] | None = None,
) -> Params:
    """``merged`` without what the method changed, in the types of ``params``. What it added is taken away whole.

    Args:
      merged: plain arrays, from ``method.merge`` or a checkpoint of it, in the segments of ``params``.
      params: of the base, before edits.
      method, train, state: what was merged.
      edits: what the method rewrote of the base (`Start.edits`); none unless given.

    Raises:
      ConfigError: ``merged`` is not of this base and method: every path that is missing, left over or of another shape.
      NotLinear: the method cannot be merged.
    """
    wide = {p: x.astype(jnp.float32) for p, x in paths.flatten(params).items() if x is not None}
    before: dict[Path, Any] = {p: wide.get(p) for p in paths.flatten(params)}
    after = paths.flatten(method.merge(apply_edits(paths.unflatten(before), edits or {}), train, state))
    found = paths.flatten(merged)
    _check(found, after)
    out: dict[Path, Any] = {}
    for path, was in paths.flatten(params).items():
        if was is None:
            out[path] = None
        else:
            change = 0 if after[path] is wide[path] else after[path].astype(jnp.float32) - wide[path]
            out[path] = (found[path].astype(jnp.float32) - change).astype(was.dtype)
    return paths.unflatten(out)


def _check(found: Mapping[Path, Any], after: Mapping[Path, Any]) -> None:
    """Raises ConfigError where what was found has other arrays than what the method makes of its base."""
    problems = []
    for path in dict.fromkeys([*after, *found]):
        there, shape = found.get(path), _shape(found.get(path))
        wanted = _shape(after.get(path))
        if operators.is_operator(there):
            problems.append(f"{path}: {type(there).__name__} stands there, so nothing was merged into it")
        elif shape is None and wanted is not None:
            problems.append(f"{path}: missing, expected {wanted}")
        elif wanted is None and shape is not None:
            problems.append(f"{path}: of shape {shape}, and neither the base nor the method has it")
        elif wanted != shape:
            problems.append(f"{path}: of shape {shape}, expected {wanted}")
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise errors.ConfigError("the merged parameters are of another base or method:\n  " + "\n  ".join(shown))


def _shape(leaf: Leaf) -> tuple[int, ...] | None:
    return None if leaf is None else tuple(leaf.shape)


class Gap(NamedTuple):
    """Where two trees differ most for their size. largest: |difference| there; size: the largest value there."""

    path: Path
    largest: float
    size: float

    def within(self, eps: float) -> bool:
        """Whether a few roundings of relative size ``eps`` explain it."""
        return self.largest <= 8 * eps * max(self.size, 1e-3)


def farthest(found: Params, expected: Params) -> Gap:
    """Of the arrays of ``expected`` the one from which ``found`` is farthest, as a part of its size."""
    gaps = []
    ours = paths.flatten(found)
    for path, x in paths.flatten(expected).items():
        if x is not None:
            want = np.asarray(x, np.float32)
            gaps.append(
                Gap(path, float(np.abs(np.asarray(ours[path], np.float32) - want).max()), float(np.abs(want).max()))
            )
    return max(gaps, key=lambda g: np.inf if np.isnan(g.largest) else g.largest / max(g.size, 1e-3))
