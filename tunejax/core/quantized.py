"""A kernel in 4 or 8 bits, which `quantize` and what builds on it put into the base; the numerics are those of qwix.

    W [in, out]  ->  values of 4 or 8 bits, and one scale for each block of ``block_size`` inputs of each output

"nf4" is NormalFloat (Dettmers et al., 2023, arXiv:2305.14314), "int8" and "int4" are symmetric integers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from tunejax.core import errors, operators

KINDS = ("nf4", "int4", "int8")


@operators.operator
class Quantized:
    """A kernel [..., in, out] as ``values`` times ``scales``.

    values: [..., in, out] of 4 or 8 bits. scales: float32 [..., in / block_size, out]. kind: one of `KINDS`.
    """

    values: jax.Array
    scales: jax.Array
    kind: str = operators.static()
    kernel_dtype: str = operators.static()

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        out = product(self.kind, x.reshape(-1, x.shape[-1]), self.values, self.scales)
        out = out.reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias.astype(x.dtype)

    def dense(self) -> jax.Array:
        """The kernel that the values stand for, in the type that it had."""
        return decoded(self.kind, self.values, self.scales, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Type that the kernel had."""
        return jnp.dtype(self.kernel_dtype)


def decoded(kind: str, values: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """The kernel [..., in, out] of values and scales."""
    return qwix.dequantize(qwix.QArray(qvalue=values, scale=scales, qtype=kind)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(kind: str, x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """x [rows, in] @ kernel -> [rows, out]; the kernel is decoded again for the gradient, so it is never kept."""
    return x @ decoded(kind, values, scales, x.dtype)


def _forward(kind: str, x: jax.Array, values: jax.Array, scales: jax.Array) -> tuple[jax.Array, Any]:
    return product(kind, x, values, scales), (values, scales)


def _backward(kind: str, kept: Any, grad: jax.Array) -> tuple[Any, None, None]:
    values, scales = kept
    return grad @ decoded(kind, values, scales, grad.dtype).T, None, None


product.defvjp(_forward, _backward)


def check(name: str, kind: str, block_size: int) -> None:
    """Raises ConfigError: an unknown kind, a block size below 1."""
    if kind not in KINDS:
        raise errors.ConfigError(f"{name}: kind is {kind!r}. {errors.did_you_mean(kind, KINDS)}")
    if block_size < 1:
        raise errors.ConfigError(f"{name}: block_size is {block_size}; it must be at least 1")


def encoded(kind: str, kernel: jax.Array, block_size: int) -> Quantized:
    """``kernel`` [..., in, out] rounded: each block divided by its greatest magnitude, then to the nearest value."""
    rank, fan_in = kernel.ndim, kernel.shape[-2]
    block = next(b for b in range(min(block_size, fan_in), 0, -1) if fan_in % b == 0)
    whole = tuple(axis for axis in range(rank) if axis != rank - 2)
    made = qwix.quantize(
        kernel.astype(jnp.float32), kind, channelwise_axes=whole, tiled_axes={rank - 2: block}, scale_dtype=jnp.float32
    )
    return Quantized(made.qvalue, made.scale, kind=kind, kernel_dtype=str(kernel.dtype))
