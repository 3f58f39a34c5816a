"""LoReFT: what a site gives is edited in a low-dimensional subspace (Wu et al., 2024, arXiv:2404.03592, equation 2).

    h + R.T (M h + c - R h)        R [rank, out] with orthonormal rows, M [rank, out] = R and c [rank] = 0 at the start

The paper writes W and b for M and c, edits the residual stream, at the first and last few positions of a prompt, and
starts from a random M. Here h is the output of a linear site, every position is edited (as cached decoding asks), and
M starts as R, so that nothing changes at first. R is the orthonormal factor of a trained matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, low_rank, operators
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = {
    **{k: v for k, v in low_rank.ALIASES.items() if v in ("rank", "targets", "layers")},
    "low_rank_dimension": "rank",
}
"""What PEFT and pyreft call it -> what it is here."""


@operators.operator
class Edited(operators.Above):
    """h + (h m + c - h r) r.T with h = base(x) + bias.

    base: kernel [..., in, out], or an operator. m [..., out, rank]; r [..., out, rank], orthonormal columns;
    c [..., rank].
    """

    base: Any
    m: jax.Array
    r: jax.Array
    c: jax.Array

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        h = operators.apply(self.base, x, bias)
        return h + operators.apply(self.r.T, operators.apply(self.m - self.r, h, self.c))

    def dense(self) -> jax.Array:
        """Raises NotLinear: the edit acts on the bias too, and adds one."""
        raise errors.NotLinear("loreft edits what the site gives, its bias included; no kernel does that")


def orthonormal(raw: jax.Array) -> jax.Array:
    """raw [..., out, rank] -> orthonormal columns that span the same, each on the side of its own."""
    q, upper = jnp.linalg.qr(raw)
    side = jnp.sign(jnp.diagonal(upper, axis1=-2, axis2=-1))
    return q * jax.lax.stop_gradient(side)[..., None, :]


def loreft(
    targets: str | list[str] = "mlp/down/kernel",
    rank: int = 4,
    layers: str | int | None = None,
) -> Method:
    """Trains an edit of what linear sites give, in a subspace of ``rank`` dimensions.

    Args:
      targets: globs over kernels; the last of each MLP unless told.
      rank: dimensions of the subspace, at most the width of what the site gives.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: rank below 1.
      TargetError (from init): nothing matched, what matched is no kernel, or its output is narrower than ``rank``.
    """
    low_rank.check("loreft", rank, 0.0)

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, _, fan_out = kernel.shape
        if rank > fan_out:
            raise errors.TargetError(f"loreft: rank is {rank}, and a site gives {fan_out} numbers; take at most those")
        r = orthonormal(low_rank.normal(key, (*lead, fan_out, rank)))
        return {"r": r, "m": jnp.copy(r), "c": jnp.zeros((*lead, rank))}

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Edited:
        return Edited(kernel, arrays["m"], orthonormal(arrays["r"]), arrays["c"])

    axes = {"m": ("out", None), "r": ("out", None)}
    return methods.per_site("loreft", targets, new, wrap, layers=layers, axes=axes)
