"""DoRA: direction by LoRA, magnitude by a trained vector (Liu et al., 2024, arXiv:2402.09353, equation 5).

    y = m / ‖V‖ · (x V) + bias        V = W + scale · A B, its norm [out] that of each column of [in, out]

The norm is held constant in the backward pass (the paper's section 4.3, equation 11), as in PEFT. PEFT keeps m as
lora_magnitude_vector [out]. With dropout PEFT drops the input of W too wherever m / ‖V‖ differs from 1; here, as in
LoRA, only that of A.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, low_rank, operators, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = low_rank.ALIASES
"""What PEFT calls it -> what it is here."""


def _fuse(
    parts: Sequence[portable.Arrays | None], widths: Sequence[int], arguments: portable.Arguments
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Side by side, as LoRA's. Raises ConfigError where a part has none: its magnitudes would be those of the base."""
    there = [p for p in parts if p is not None]
    if len(there) < len(parts):
        raise errors.ConfigError(
            f"dora: PEFT scales all columns of a module, and {len(parts) - len(there)} of {len(parts)} parts of one "
            "are not of the same dora; adapt all of them by one, or export with --format hf"
        )
    assert low_rank.PEFT.fuse is not None
    arrays, changed = low_rank.PEFT.fuse(parts, widths, arguments)
    return {**arrays, "m": np.concatenate([p["m"] for p in there])}, changed


PEFT = portable.Form(
    "LORA",
    write=lambda arrays: {**low_rank.PEFT.write(arrays), "lora_magnitude_vector": arrays["m"]},
    read=lambda tensors, _: {
        "a": tensors["lora_A.weight"].T,
        "b": tensors["lora_B.weight"].T,
        "m": tensors["lora_magnitude_vector"],
    },
    entries=low_rank.ENTRIES,
    absent=low_rank.PEFT.absent,
    flags={"use_dora": True},
    patterns=True,
    biases="lora_only",
    fuse=_fuse,
    split=lambda arrays, i, of: {
        "a": arrays["a"],
        "b": np.split(arrays["b"], of, axis=1)[i],
        "m": np.split(arrays["m"], of)[i],
    },
)


@operators.operator
class DoRA(operators.Above):
    """inner(x) · m / ‖inner‖, a column at a time.

    inner: an operator that stands for [..., in, out]. m: magnitudes [..., out].
    """

    inner: Any
    m: jax.Array

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        gain = self.m / jax.lax.stop_gradient(self._norms())
        out = self.inner(x) * gain.astype(x.dtype)
        return out if bias is None else out + operators.dense_bias(self.inner, bias).astype(x.dtype)

    def dense(self) -> jax.Array:
        """The columns of the inner kernel, at their magnitudes."""
        gain = self.m / self._norms()
        return (operators.dense(self.inner).astype(jnp.float32) * gain[..., None, :]).astype(self.dtype)

    def _norms(self) -> jax.Array:
        """What the columns are divided by: their norms, or 1 where a column is 0 and would be no number."""
        norms = column_norms(self.inner)
        return jnp.where(norms == 0, 1.0, norms)


def column_norms(kernel: Any) -> jax.Array:
    """[..., in, out] (or an operator) -> the Euclidean norm of each column [..., out], in float32."""
    return jnp.linalg.norm(operators.dense(kernel).astype(jnp.float32), axis=-2)


def dora(
    targets: str | list[str] = "/layers/**/kernel",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    layers: str | int | None = None,
) -> Method:
    """Trains low-rank products beside frozen kernels, and the length of each column of their sums.

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      rank: inner width r.
      alpha: the product is scaled by alpha / rank,
      rslora: or by alpha / sqrt(rank).
      dropout: rate on the input of A while training.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: rank below 1, dropout outside [0, 1).
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    low_rank.check("dora", rank, dropout, alpha)
    scale = low_rank.scale_of(alpha, rank, rslora)

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        return {**low_rank.factors(key, kernel, rank), "m": column_norms(kernel)}

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> DoRA:
        return DoRA(low_rank.beside(kernel, arrays["a"], arrays["b"], ctx, scale, dropout), arrays["m"])

    return methods.per_site("dora", targets, new, wrap, layers=layers, axes={**low_rank.AXES, "m": ("out",)})
