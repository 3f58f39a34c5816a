"""MiSS, matrix shard sharing: all shards of a kernel's input share one trained matrix (Kang and Yin, 2024,
arXiv:2409.15371, equation 6).

    y = x W + (Σ_j x[j · rank : (j + 1) · rank]) B        B [rank, out] = 0 at the start

which adds B to each shard of W's rows; the last shard may be shorter. There is no second factor to multiply with, so a
step costs less than LoRA's. PEFT's variants 'bat' and 'mini' are not here.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, low_rank, operators, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = {
    **{k: v for k, v in low_rank.ALIASES.items() if v in ("rank", "targets", "layers")},
    "miss_dropout": "dropout",
}
"""What PEFT calls it -> what it is here."""

PEFT = portable.Form(
    "MISS",
    write=lambda arrays: {"miss_block": arrays["b"]},
    read=lambda tensors, _: {"b": tensors["miss_block"]},
    entries={"rank": "r", "dropout": "miss_dropout"},
    flags={"init_weights": (True, False, None)},
    biases="MiSS_only",
    plain=False,
    ignored=frozenset({"mini_r"}),
)


@operators.operator
class Sharded(operators.Added):
    """base(x) + (sum of the shards of dropout(x)) b.

    base: kernel [..., in, out], or an operator that stands for one. b [..., rank, out].
    key: [...] PRNG keys of the dropout, one a layer, or None where there is none.
    """

    base: Any
    b: jax.Array
    key: Any = None
    dropout: float = operators.static(default=0.0)

    def parts(self, x: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """What the base gives, and what is added to it; each [..., out]."""
        rank = self.b.shape[-2]
        inner = low_rank.drop(x, self.dropout, self.key)
        inner = jnp.pad(inner, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)])
        shared = inner.reshape(*x.shape[:-1], -1, rank).sum(-2)
        return operators.apply(self.base, x, bias), operators.apply(self.b, shared)

    def delta(self) -> jax.Array:
        """What is added to the kernel [..., in, out]: b at every shard."""
        fan_in = self.shape[-2]
        return jnp.tile(self.b, (-(-fan_in // self.b.shape[-2]), 1))[..., :fan_in, :]


def miss(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 64,
    dropout: float = 0.0,
    layers: str | int | None = None,
) -> Method:
    """Trains one matrix a kernel, which all shards of its input share.

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      rank: width of a shard.
      dropout: rate on the input of the shards while training.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: rank below 1, dropout outside [0, 1).
      TargetError (from init): nothing matched, what matched is no kernel, or a kernel's input is narrower than rank.
    """
    low_rank.check("miss", rank, dropout)

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, fan_in, fan_out = kernel.shape
        if rank > fan_in:
            raise errors.TargetError(f"miss: rank is {rank}, and a kernel's input has {fan_in} entries")
        return {"b": jnp.zeros((*lead, rank, fan_out), jnp.float32)}

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Sharded:
        return Sharded(kernel, arrays["b"], low_rank.keys(ctx, kernel, dropout), dropout)

    return methods.per_site("miss", targets, new, wrap, layers=layers, axes={"b": (None, "out")})
