"""Householder reflection adaptation: the input of a frozen kernel is mirrored several times (Yuan et al., 2024,
arXiv:2405.17484, equation 4).

    y = (x H_rank ... H_1) W        H_i = I - 2 u_i u_i^T / ‖u_i‖²        u [in, rank]

A product of reflections is orthogonal, and differs from the identity by a matrix of that rank at most. Reflections
start as pairs of equals, each of which undoes the other. The paper's regulariser of their angles is not here.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, low_rank, operators, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = {k: v for k, v in low_rank.ALIASES.items() if v in ("rank", "targets", "layers")}
"""What PEFT calls it -> what it is here."""

PEFT = portable.Form(
    "HRA",
    write=lambda arrays: {"hra_u": arrays["u"]},
    read=lambda tensors, _: {"u": tensors["hra_u"]},
    entries={"rank": "r"},
    written=lambda arguments, _: {k: v for k, v in arguments.items() if k != "pairs"},
    flags={"apply_GS": (False, None)},
    # Of an odd rank no folder can have started as pairs.
    found=lambda arrays: {"pairs": False} if arrays["u"].shape[-1] % 2 else {},
    settings=lambda modules: {"init_weights": all(a["u"].shape[-1] % 2 == 0 for a in modules.values())},
    biases="hra_only",
    plain=False,
)


@operators.operator
class Mirrored(operators.Above):
    """base(x H_rank ... H_1).

    base: kernel [..., in, out], or an operator. u [..., in, rank]: normals of the mirrors, each of length 1.
    """

    base: Any
    u: jax.Array

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        for i in reversed(range(self.u.shape[-1])):
            normal = self.u[:, i].astype(x.dtype)
            x = x - 2 * (x @ normal)[..., None] * normal
        return operators.apply(self.base, x, bias)

    def dense(self) -> jax.Array:
        """H_rank ... H_1 times the kernel, in float32, rounded once to the type of the base."""
        kernel = operators.dense(self.base).astype(jnp.float32)
        for i in range(self.u.shape[-1]):
            normal = self.u[..., i, None]
            kernel = kernel - 2 * normal * jnp.sum(normal * kernel, axis=-2, keepdims=True)
        return kernel.astype(self.dtype)


def hra(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 8,
    layers: str | int | None = None,
    pairs: bool = True,
) -> Method:
    """Mirrors each kernel's input at ``rank`` trained planes.

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      rank: number of reflections; even, so that they start as pairs.
      layers: only these layers of the stack, as a slice: "-2:".
      pairs: False: each starts by itself, and the model is another from the start; any rank will do.

    Raises:
      ConfigError: rank is below 1, or odd where they start as pairs.
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    alike = 2 if pairs else 1
    if rank < alike or rank % alike:
        ranks = "reflections start as pairs, so it must be 2, 4, 6, ..." if pairs else "it must be at least 1"
        raise errors.ConfigError(f"hra: rank is {rank}; {ranks}")

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, fan_in, _ = kernel.shape
        # Of the length that PEFT draws, kaiming_uniform_(a=sqrt(5)): it decides how far a step turns a mirror.
        drawn = low_rank.uniform(key, (*lead, fan_in, rank // alike), 1 / math.sqrt(rank // alike))
        return {"u": jnp.repeat(drawn, alike, axis=-1)}

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Mirrored:
        u = arrays["u"]
        return Mirrored(kernel, u / jnp.linalg.norm(u, axis=-2, keepdims=True))

    return methods.per_site("hra", targets, new, wrap, layers=layers, axes={"u": ("in", None)})
