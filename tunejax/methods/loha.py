"""LoHa: the entrywise product of two low-rank products beside a frozen kernel (Hyeon-Woo et al., 2022,
arXiv:2108.06098, proposition 2).

    y = x (W + scale · (A1 B1) ∘ (A2 B2))        A1, A2 [in, rank], B1, B2 [rank, out], A2 = 0 at the start

Its rank may be as high as rank². PEFT's hada_w1_b is A1.T, hada_w1_a is B1.T, and so for the second pair.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import low_rank, operators, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = {k: v for k, v in low_rank.ALIASES.items() if v in ("rank", "targets", "layers")}
"""What PEFT calls it -> what it is here."""

TENSORS = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}

PEFT = portable.Form(
    "LOHA",
    write=lambda arrays: {TENSORS[k]: x.T for k, x in arrays.items()},
    read=lambda tensors, _: {k: tensors[theirs].T for k, theirs in TENSORS.items()},
    entries={"rank": "r", "alpha": "alpha"},
    ignored=frozenset({"rank_dropout", "module_dropout"}),
    patterns=True,
    plain=False,
)


@operators.operator
class LoHa(operators.Added):
    """base(x) + scale · x ((a1 b1) ∘ (a2 b2)).

    base: kernel [..., in, out], or an operator that stands for one. a1, a2 [..., in, rank]; b1, b2 [..., rank, out].
    """

    base: Any
    a1: jax.Array
    b1: jax.Array
    a2: jax.Array
    b2: jax.Array
    scale: float = operators.static(default=1.0)

    def delta(self) -> jax.Array:
        """What is added to the kernel [..., in, out]."""
        return self.scale * (self.a1 @ self.b1) * (self.a2 @ self.b2)


def loha(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 8,
    alpha: float = 8.0,
    layers: str | int | None = None,
) -> Method:
    """Trains the Hadamard product of two low-rank products beside each kernel.

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      rank: inner width r of both products.
      alpha: the change is scaled by alpha / rank.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: rank below 1.
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    low_rank.check("loha", rank, 0.0, alpha)

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, fan_in, fan_out = kernel.shape
        keys = jax.random.split(key, 3)
        a1 = low_rank.uniform(keys[0], (*lead, fan_in, rank), 1 / math.sqrt(fan_in))
        b1 = low_rank.uniform(keys[1], (*lead, rank, fan_out), 1 / math.sqrt(rank))
        b2 = low_rank.uniform(keys[2], (*lead, rank, fan_out), 1 / math.sqrt(rank))
        return {"a1": a1, "b1": b1, "a2": jnp.zeros((*lead, fan_in, rank), jnp.float32), "b2": b2}

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> LoHa:
        return LoHa(kernel, **arrays, scale=alpha / rank)

    axes = {"a1": ("in", None), "b1": (None, "out"), "a2": ("in", None), "b2": (None, "out")}
    return methods.per_site("loha", targets, new, wrap, layers=layers, axes=axes)
