"""LoftQ: a base in few bits, and a low-rank start that makes up for the rounding (Li et al., 2023, arXiv:2310.08659).

    Q_t = q(W - A_{t-1} B_{t-1})        A_t B_t = SVD_r(W - Q_t)        A_0 B_0 = 0        (algorithm 1)

The base becomes Q_T, and A and B train from A_T, B_T; the singular values are shared evenly between the two. One round
is the default, as in PEFT: Q_1 = q(W) is the same everywhere. Q of later rounds is made again when an adapter is
loaded, no two programs give an SVD in the same bits, and an entry halfway between two levels (with int4 the greatest of
a block is one) may then take the other: train and serve such an adapter on like machines.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, holes, low_rank, quantized
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

ALIASES = {**low_rank.ALIASES, "loftq_iter": "iterations"}
"""What PEFT calls it -> what it is here."""

PEFT = low_rank.PEFT._replace(read=None)
"""A plain LoRA, on the rounded base."""


def loftq(
    kind: str = "nf4",
    rank: int = 8,
    iterations: int = 1,
    targets: str | list[str] = "/layers/**/kernel",
    alpha: float = 16.0,
    dropout: float = 0.0,
    block_size: int = 64,
) -> Method:
    """Rounds kernels of the base and trains low-rank products that start as what rounding lost (arXiv:2310.08659).

    Args:
      kind: "nf4", "int4" or "int8".
      rank: inner width r, at most the smaller side of each kernel.
      iterations: rounds T of rounding and decomposing.
      targets: globs over kernels; every linear layer of the stack unless told.
      alpha: the product is scaled by alpha / rank; the start does not depend on it.
      dropout: rate on the input of A while training.
      block_size: inputs that share a scale, at most: the greatest divisor of a kernel's inputs up to it is taken.

    Raises:
      ConfigError: an unknown kind; a block size, rank or number of rounds below 1; dropout outside [0, 1).
      TargetError (from init): nothing matched, what matched is no plain kernel, or it has a side below ``rank``.
    """
    quantized.check("loftq", kind, block_size)
    low_rank.check("loftq", rank, dropout, alpha)
    low_rank.check_root("loftq", alpha)
    if iterations < 1:
        raise errors.ConfigError(f"loftq: iterations is {iterations}; it must be at least 1 (the paper takes 5)")
    scale = low_rank.scale_of(alpha, rank, False)

    def init(key: Any, params: Params) -> Start:
        sites = holes.kernels("loftq", params, targets)
        edits, train = {}, {}
        for path, kernel in sites.items():
            if rank > min(kernel.shape[-2:]):
                raise errors.TargetError(f"loftq: rank is {rank}, and {path} of shape {tuple(kernel.shape)} has less")
            edits[path], a, b = split(kernel, kind, rank, iterations, block_size)
            train[path] = {"a": a / scale**0.5, "b": b / scale**0.5}
        return Start(edits=edits, train=train)

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> low_rank.LowRank:
        return low_rank.beside(kernel, arrays["a"], arrays["b"], ctx, scale, dropout)

    sited = methods.per_site("loftq", targets, lambda key, kernel: {}, wrap, axes=low_rank.AXES)
    return sited._replace(init=init)


def split(kernel: Any, kind: str, rank: int, iterations: int, block_size: int) -> tuple[Any, jax.Array, jax.Array]:
    """Kernel [..., in, out] -> (`Quantized` Q, A [..., in, rank], B [..., rank, out]) with Q + A B near the kernel."""
    weight = kernel.astype(jnp.float32)
    change = jnp.zeros_like(weight)
    for _ in range(iterations):
        base = quantized.encoded(kind, (weight - change).astype(kernel.dtype), block_size)
        rest = weight - base.dense().astype(jnp.float32)
        # A layer at a time: the work of a decomposition is as large as the kernel.
        a, b = jax.lax.map(lambda w: _leading(w, rank), rest) if rest.ndim == 3 else _leading(rest, rank)
        change = jnp.matmul(a, b, precision="highest")
    return base, a, b


def _leading(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]
