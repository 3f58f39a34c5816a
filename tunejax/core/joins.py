"""What may stand in the slots ``attention/join`` and ``mlp/join`` of a block, where a branch meets the residual.

    x + b, or norm(x + b) in a block whose norms come last        b = branch + change(r)

r is x, the residual, or the sum that the block would give without the change: x + branch, normed where a norm follows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from tunejax.core import errors, operators, paths
from tunejax.core.method import SHARED, Context, Method, Start
from tunejax.core.paths import Params, Path

READS = ("branch", "sum", "residual")
"""What a method at a branch may read; of these, "branch" needs no slot: the branch's last kernel gives it."""
LAST = ("attention/o/kernel", "mlp/down/kernel")
"""The last kernels of the branches; their slots lie beside the module."""


@operators.operator
class AtJoin:
    """branch + inner.change(r); see this module.

    inner: an operator with ``change``, whose own ``base`` is not used. base: what stood in the slot before, or None.
    """

    inner: Any
    base: Any = None
    reads: str = operators.static(default="sum")

    def joined(
        self, branch: jax.Array, residual: jax.Array, norm: Callable[[jax.Array], jax.Array] | None
    ) -> jax.Array:
        """What is added to ``residual``; each [..., embed]."""
        if self.base is not None:
            branch = self.base.joined(branch, residual, norm)
        read = residual if self.reads == "residual" else residual + branch
        if self.reads == "sum" and norm is not None:
            read = norm(read)
        return branch + self.inner.change(read)

    def dense(self) -> jax.Array:
        """Raises NotLinear: no plain model has anything there."""
        raise errors.NotLinear(f"what reads the {self.reads} where a branch joins is no kernel; serve it unmerged")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its first kernel: [..., embed, width]."""
        return self.inner.down.shape

    @property
    def dtype(self) -> Any:
        """Type of its arrays."""
        return self.inner.down.dtype


def reading(method: Method, reads: str) -> Method:
    """``method``, whose operators (with ``base`` and ``change``) read the ``sum`` or the ``residual`` of their blocks.

    Args:
      method: keeps arrays by path (`per_site`) and wraps the last kernels of branches.
      reads: one of `READS`.

    Raises:
      ConfigError: ``reads`` is none of these.
      TargetError (from init): it wraps a kernel that is not the last of a branch.
    """
    if reads not in READS:
        raise errors.ConfigError(f"{method.name}: reads is {reads!r}. {errors.did_you_mean(reads, READS)}")
    if reads == "branch":
        return method

    def init(key: Any, params: Params) -> Start:
        start = method.init(key, params)
        wrong = [p for p in start.train if p != SHARED and not p.endswith(LAST)]
        if wrong:
            raise errors.TargetError(
                f"{method.name} targets {wrong[0]}, and reads: {reads} is where a branch joins the residual; "
                f"target {' or '.join(LAST)}"
            )
        return start

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        bound = method.bind(params, train, state, ctx)
        moved: dict[Path, Any] = {}
        for path in train:
            if path != SHARED:
                op, slot = paths.get(bound, path), path.rsplit("/", 2)[0] + "/join"
                moved[path] = op.base
                moved[slot] = AtJoin(dataclasses.replace(op, base=None), paths.get(bound, slot), reads=reads)
        return paths.replace(bound, moved)

    def merge(params: Params, train: Any, state: Any) -> Params:
        return operators.densify(bind(params, train, state, Context()))

    return method._replace(init=init, bind=bind, merge=merge)
