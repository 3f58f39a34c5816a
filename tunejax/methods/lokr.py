"""A Kronecker product beside a frozen kernel: KronA (Edalati et al., 2022, arXiv:2212.10650, equation 4) and LoKr,
whose factors may themselves be low-rank products (Yeh et al., 2024, arXiv:2309.14859, section 3.3).

    y = x (W + scale · K1 ⊗ K2)        K1 [in1, out1] = 0 at the start, K2 [in2, out2]; in1 · in2 = in

PEFT stores all transposed: its lokr_w1 is K1.T; of a factor that is a product, its lokr_w1_b is A1.T and its lokr_w1_a
is B1.T, where K1 = A1 B1. The big matrix is never formed: x is read as [in1, in2].
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, low_rank, operators, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = {
    **{k: v for k, v in low_rank.ALIASES.items() if v in ("rank", "targets", "layers")},
    "decompose_factor": "factor",
}
"""What PEFT calls it -> what it is here."""

TENSORS = {
    "k1": "lokr_w1", "a1": "lokr_w1_b", "b1": "lokr_w1_a", "k2": "lokr_w2", "a2": "lokr_w2_b", "b2": "lokr_w2_a",
}  # fmt: skip
WHOLE = ("k1", "k2")


def _read(tensors: portable.Arrays, arguments: portable.Arguments) -> dict[str, np.ndarray]:
    return {k: tensors[theirs].T for k, theirs in TENSORS.items() if theirs in tensors}


def _as_lokr(arguments: portable.Arguments, sites: Sequence[portable.Arrays]) -> dict[str, Any]:
    """KronA as the LoKr of a rank so high that both factors are whole."""
    rank = max(side for arrays in sites for k in WHOLE for side in arrays[k].shape[-2:])
    return {**arguments, "decompose_both": False, "rank": rank, "alpha": arguments["alpha"] * rank}


_LOKR = portable.Form(
    "LOKR",
    write=lambda arrays: {TENSORS[k]: x.T for k, x in arrays.items()},
    read=_read,
    entries={"rank": "r", "alpha": "alpha", "decompose_both": "decompose_both", "factor": "decompose_factor"},
    patterns=True,
    plain=False,
    ignored=frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale"}),
)
PEFT = {"lokr": _LOKR, "krona": _LOKR._replace(read=None, written=_as_lokr)}


@operators.operator
class Kronecker(operators.Added):
    """base(x) + scale · x (k1 ⊗ k2).

    base: kernel [..., in1 · in2, out1 · out2], or an operator. k1 [..., in1, out1]; k2 [..., in2, out2].
    """

    base: Any
    k1: jax.Array
    k2: jax.Array
    scale: float = operators.static(default=1.0)

    def parts(self, x: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """What the base gives, and what is added to it; each [..., out]."""
        split = x.reshape(*x.shape[:-1], self.k1.shape[-2], self.k2.shape[-2])
        second = operators.apply(self.k2, split)
        both = jnp.einsum("...mk,ml->...lk", second, self.scale * self.k1.astype(x.dtype))
        return operators.apply(self.base, x, bias), both.reshape(*x.shape[:-1], -1)

    def delta(self) -> jax.Array:
        """scale · k1 ⊗ k2, which is added to the kernel [..., in, out]."""
        return self.scale * jnp.einsum("...ml,...nk->...mnlk", self.k1, self.k2).reshape(self.shape)


def lokr(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 8,
    alpha: float = 8.0,
    decompose_both: bool = False,
    factor: int = -1,
    layers: str | int | None = None,
) -> Method:
    """Trains a Kronecker product beside each kernel, the larger factor low-rank where smaller (arXiv:2309.14859).

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      rank: of a factor that is a product; a factor with no side above 2 · rank is whole.
      alpha: the change is scaled by alpha / rank.
      decompose_both: K1 may be a product too.
      factor: what in1 and out1 should be, or the nearest smaller divisor; -1: the divisors nearest to the roots.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: rank below 1, or a factor that is neither -1 nor positive.
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    low_rank.check("lokr", rank, 0.0, alpha)
    return _method("lokr", targets, rank, alpha / rank, decompose_both, factor, layers)


def krona(
    targets: str | list[str] = "/layers/**/kernel",
    alpha: float = 1.0,
    factor: int = -1,
    layers: str | int | None = None,
) -> Method:
    """Trains a Kronecker product of two whole matrices beside each kernel, scaled by ``alpha``; otherwise `lokr`.

    Raises:
      ConfigError, TargetError: as `lokr`.
    """
    low_rank.check("krona", 1, 0.0, alpha)
    return _method("krona", targets, None, alpha, False, factor, layers)


def _method(
    name: str,
    targets: str | list[str],
    rank: int | None,
    scale: float,
    both: bool,
    factor: int,
    layers: str | int | None,
) -> Method:
    """``rank`` None: both factors are whole."""
    if factor < 1 and factor != -1:
        raise errors.ConfigError(f"{name}: factor is {factor}; it must be positive, or -1 for the most even split")

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, fan_in, fan_out = kernel.shape
        (in1, in2), (out1, out2) = divisors(fan_in, factor), divisors(fan_out, factor)
        one, two = jax.random.split(key)
        thin1 = rank is not None and both and 2 * rank < max(in1, out1)
        thin2 = rank is not None and 2 * rank < max(in2, out2)
        first = _factor(one, (*lead, in1, out1), rank if thin1 else None, zero=True)
        return {k + "1": x for k, x in first.items()} | {
            k + "2": x for k, x in _factor(two, (*lead, in2, out2), rank if thin2 else None, zero=False).items()
        }

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Kronecker:
        k1, k2 = (arrays[f"k{i}"] if f"k{i}" in arrays else arrays[f"a{i}"] @ arrays[f"b{i}"] for i in (1, 2))
        return Kronecker(kernel, k1, k2, scale=scale)

    return methods.per_site(name, targets, new, wrap, layers=layers)


def _factor(key: Any, shape: tuple[int, ...], rank: int | None, *, zero: bool) -> dict[str, jax.Array]:
    """{"k": [..., in, out]}, or the {"a", "b"} of a product; zero where asked, else drawn as PEFT draws them."""
    *lead, fan_in, fan_out = shape
    if rank is None:
        return {"k": jnp.zeros(shape) if zero else low_rank.uniform(key, shape, 1 / math.sqrt(fan_in))}
    one, two = jax.random.split(key)
    a = low_rank.uniform(one, (*lead, fan_in, rank), 1 / math.sqrt(fan_in))
    wide = (*lead, rank, fan_out)
    return {"a": a, "b": jnp.zeros(wide) if zero else low_rank.uniform(two, wide, 1 / math.sqrt(rank))}


def divisors(size: int, factor: int) -> tuple[int, int]:
    """(m, n), m <= n, m · n = size: ``factor`` and its cofactor where it divides ``size``, in either order; else m is
    the largest divisor that is at most ``factor`` (-1: any) and at most the root of ``size``."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = max(d for d in range(1, limit + 1) if size % d == 0)
    return m, size // m
