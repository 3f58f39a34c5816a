"""LoRA that starts from the kernel's own factors: PiSSA and OLoRA.

    y = x W + scale · ((x A) B - (x A0) B0)        (A0, B0): the first (A, B)

PiSSA (Meng et al., 2024, arXiv:2404.02948) takes the leading singular triplets, OLoRA (Büyükakyüz, 2024,
arXiv:2406.01775) the leading part of a QR decomposition. The papers, and PEFT, write W - scale · A0 B0 into the base;
here the base stays as it is and A0, B0 lie in ``state``, for no two machines give a decomposition in the same bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import combine, errors, low_rank, operators, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Site

ALIASES = low_rank.ALIASES
"""What PEFT calls it -> what it is here."""


def _difference(arrays: portable.Arrays) -> dict[str, np.ndarray]:
    """Both products as one of twice the rank."""
    a = np.concatenate([arrays["a"], arrays["a0"]], axis=1)
    return {"a": a, "b": np.concatenate([arrays["b"], -arrays["b0"]], axis=0)}


def _doubled(arguments: portable.Arguments, sites: Sequence[portable.Arrays]) -> dict[str, Any]:
    """The same scale at twice the rank."""
    grown = math.sqrt(2) if arguments["rslora"] else 2
    return {**arguments, "rank": 2 * arguments["rank"], "alpha": grown * arguments["alpha"]}


def _form(start: str) -> portable.Form:
    own = low_rank.PEFT._replace(flags={**low_rank.PEFT.flags, "init_lora_weights": start}, fuse=None, split=None)
    return low_rank.PEFT._replace(
        write=lambda arrays: low_rank.PEFT.write(_difference(arrays)), read=None, written=_doubled, fuse=None, own=own
    )


PEFT = {"pissa": _form("pissa"), "olora": _form("olora")}
"""Written as a plain LoRA of twice the rank, on the base as it is; PEFT's own folders hold A and B alone, and whoever
loads one takes A0 and B0 from the base once more."""

PRODUCT = low_rank.PRODUCT._replace(
    factors=lambda arrays: combine.Factors(
        jnp.concatenate([arrays["a"], arrays["a0"]], axis=-1), jnp.concatenate([arrays["b"], -arrays["b0"]], axis=-2)
    ),
    scaled=("b", "b0"),
)
"""The same, to combine."""


def pissa(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    rslora: bool = False,
    layers: str | int | None = None,
) -> Method:
    """LoRA from the leading singular triplets of each kernel (arXiv:2404.02948).

    scale · A0 B0 is then the kernel's best approximation of that rank.

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      rank: inner width r, at most the smaller side of each kernel.
      alpha: the product is scaled by alpha / rank (the paper takes 1),
      rslora: or by alpha / sqrt(rank).
      dropout: rate on the input of A and A0 while training (the paper takes 0).
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: rank below 1, dropout outside [0, 1).
      TargetError (from init): nothing matched, what matched is no kernel, or it has a side below ``rank``.
    """

    low_rank.check_root("pissa", alpha)

    def leading(kernel: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
        u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
        root = jnp.sqrt(s[:rank] / scale)
        return u[:, :rank] * root, root[:, None] * vt[:rank]

    return _method("pissa", leading, targets, rank, alpha, dropout, rslora, layers)


def olora(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    rslora: bool = False,
    layers: str | int | None = None,
) -> Method:
    """LoRA from a QR decomposition of each transposed kernel (arXiv:2406.01775): B0 has orthonormal rows.

    The kernel is read as [out, in]. Arguments are those of `pissa`.

    Raises:
      ConfigError, TargetError: as `pissa`.
    """

    def leading(kernel: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
        q, r = jnp.linalg.qr(kernel.T)
        return r[:rank].T, q[:, :rank].T

    return _method("olora", leading, targets, rank, alpha, dropout, rslora, layers)


def _method(
    name: str,
    leading: Callable[[jax.Array, float], tuple[jax.Array, jax.Array]],
    targets: str | list[str],
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool,
    layers: str | int | None,
) -> Method:
    """``leading``: (kernel [in, out] in float32, scale) -> A0 [in, rank], B0 [rank, out]."""
    low_rank.check(name, rank, dropout, alpha)
    scale = low_rank.scale_of(alpha, rank, rslora)

    def new(key: Any, kernel: Any) -> Site:
        if rank > min(kernel.shape[-2:]):
            raise errors.TargetError(f"{name}: rank is {rank}, and a kernel of shape {tuple(kernel.shape)} has less")
        weight = operators.dense(kernel).astype(jnp.float32)
        # A layer at a time: the work of a decomposition is as large as the kernel.
        one = lambda w: leading(w, scale)  # noqa: E731
        a, b = jax.lax.map(one, weight) if weight.ndim == 3 else one(weight)
        return Site({"a": a, "b": b}, {"a0": jnp.copy(a), "b0": jnp.copy(b)})

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> low_rank.LowRank:
        # The difference of two products of rank r is one of rank 2r.
        a = jnp.concatenate([arrays["a"], arrays["a0"]], axis=-1)
        b = jnp.concatenate([arrays["b"], -arrays["b0"]], axis=-2)
        return low_rank.beside(kernel, a, b, ctx, scale, dropout)

    return methods.per_site(name, targets, new, wrap, layers=layers, axes=low_rank.AXES)
