"""VeRA: vectors that scale one frozen random pair of matrices (Kopiczko et al., 2024, arXiv:2310.11454, equation 2).

    y = x W + ((x A) · d) B · b        A [in, rank] and B [rank, out] frozen, d [rank] and b [out] = 0 train

All sites and layers share one pair: a site of width [in, out] takes the first ``in`` rows of A and the first ``out``
columns of B. It is drawn from ``seed`` alone and lies in ``state``. PEFT calls d and b vera_lambda_d and vera_lambda_b,
and stores A and B transposed. A and B are repeated for each layer of a stack while a step runs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, low_rank, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Site
from tunejax.core.paths import Path

ALIASES = {
    **low_rank.ALIASES,
    "vera_dropout": "dropout",
    "projection_prng_key": "seed",
}
"""What PEFT calls it -> what it is here."""

PEFT = portable.Form(
    "VERA",
    write=lambda arrays: {"vera_lambda_d": arrays["scale_d"], "vera_lambda_b": arrays["scale_b"]},
    read=lambda tensors, _: {"scale_d": tensors["vera_lambda_d"], "scale_b": tensors["vera_lambda_b"]},
    entries={"rank": "r", "d_initial": "d_initial", "dropout": "vera_dropout", "seed": "projection_prng_key"},
    ignored=frozenset({"save_projection"}),
    biases="vera_only",
    settings=lambda modules: {"save_projection": True},
    write_shared=lambda arrays: {"vera_A": arrays["a"].T, "vera_B": arrays["b"].T},
    read_shared=lambda tensors: {"a": tensors["vera_A"].T, "b": tensors["vera_B"].T},
)
"""A and B are always written: PEFT's own draw from a seed is another."""


def vera(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 256,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    seed: int = 0,
    layers: str | int | None = None,
) -> Method:
    """Trains two vectors a site around a shared random low-rank product.

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      rank: inner width r.
      d_initial: what d starts as.
      dropout: rate on the input of A while training.
      seed: of A and B, whatever the run's own seed: adapters of one seed share them.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: rank below 1, dropout outside [0, 1), a seed that is no number of 32 bits.
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    low_rank.check("vera", rank, dropout)
    if not 0 <= seed < 2**32:
        raise errors.ConfigError(f"vera: seed is {seed}; it must lie in [0, 2^32)")

    def shared(key: Any, kernels: dict[Path, Any]) -> Site:
        rows = max(k.shape[-2] for k in kernels.values())
        columns = max(k.shape[-1] for k in kernels.values())
        one, two = jax.random.split(jax.random.key(seed))
        # He's uniform draw (arXiv:1502.01852): variance 2 / fan-in.
        a = low_rank.uniform(one, (rows, rank), math.sqrt(6 / rows))
        return Site(state={"a": a, "b": low_rank.uniform(two, (rank, columns), math.sqrt(6 / rank))})

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, _, fan_out = kernel.shape
        return {
            "scale_d": jnp.full((*lead, rank), d_initial, jnp.float32),
            "scale_b": jnp.zeros((*lead, fan_out), jnp.float32),
        }

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> low_rank.LowRank:
        *lead, fan_in, fan_out = kernel.shape
        a = jnp.broadcast_to(arrays["a"][:fan_in], (*lead, fan_in, rank))
        b = arrays["scale_d"][..., :, None] * arrays["b"][:, :fan_out] * arrays["scale_b"][..., None, :]
        return low_rank.beside(kernel, a, b, ctx, 1.0, dropout)

    return methods.per_site("vera", targets, new, wrap, shared=shared, layers=layers, axes={"scale_b": ("out",)})
