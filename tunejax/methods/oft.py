"""Orthogonal fine-tuning: the input of a frozen kernel is rotated. OFT (Qiu et al., 2023, arXiv:2306.07280) and BOFT
(Liu et al., 2024, arXiv:2311.06243).

    y = (x R) W · s + bias        R [in, in] orthogonal, the identity at the start

R is a product of factors, each block-diagonal in some order of the coordinates; a block is the Cayley transform of a
skew-symmetric matrix. OFT has one factor and no s; BOFT has several, ordered as the butterflies of a fast Fourier
transform, so R is dense, and a trained scale s [out] of the output.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, low_rank, operators, portable
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = {
    **{k: v for k, v in low_rank.ALIASES.items() if v in ("targets", "layers")},
    "oft_block_size": "block_size",
    "use_cayley_neumann": "neumann",
    "num_cayley_neumann_terms": "terms",
    "boft_block_size": "block_size",
    "boft_n_butterfly_factor": "factors",
}
"""What PEFT calls it -> what it is here."""

_CUDA = "PEFT loads a boft of several factors only where it can build its CUDA extension (a GPU, CUDA_HOME, ninja)"

PEFT = {
    "oft": portable.Form(
        "OFT",
        write=lambda arrays: {"oft_R.weight": arrays["skew"]},
        read=lambda tensors, _: {"skew": tensors["oft_R.weight"]},
        entries={
            "block_size": "oft_block_size",
            "block_share": "block_share",
            "neumann": "use_cayley_neumann",
            "terms": "num_cayley_neumann_terms",
        },
        plain=False,
        ignored=frozenset({"r", "eps", "module_dropout"}),
        biases="oft_only",
        # PEFT shrinks a block that does not divide a module's input: what counts is what it kept.
        found=lambda arrays: {"block_size": (1 + math.isqrt(1 + 8 * arrays["skew"].shape[-1])) // 2},
        # The first version with this series; PEFT warns where none is named.
        settings=lambda modules: {"peft_version": "0.18.0"},
    ),
    "boft": portable.Form(
        "BOFT",
        write=lambda arrays: {"boft_R": arrays["r"], "boft_s": arrays["s"][:, None]},
        read=lambda tensors, _: {"r": tensors["boft_R"], "s": tensors["boft_s"][:, 0]},
        entries={"block_size": "boft_block_size", "factors": "boft_n_butterfly_factor"},
        plain=False,
        ignored=frozenset({"boft_block_num", "boft_dropout"}),
        biases="boft_only",
        found=lambda arrays: {"block_size": arrays["r"].shape[-1], "factors": arrays["r"].shape[0]},
        note=lambda arguments: _CUDA if arguments.get("factors", 1) > 1 else "",
    ),
}


@operators.operator
class Rotated(operators.Above):
    """base(x R) · s, where x R applies the last of the factors first.

    base: kernel [..., in, out], or an operator. blocks [..., factors, in / block, block, block], each orthogonal.
    s: [..., out], or None for 1.
    """

    base: Any
    blocks: jax.Array
    s: jax.Array | None = None

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        for i in reversed(range(self.blocks.shape[-4])):
            x = butterfly(x, self.blocks[i].astype(x.dtype), i)
        if self.s is None:
            return operators.apply(self.base, x, bias)
        out, s = operators.apply(self.base, x, bias), self.s.astype(x.dtype)
        if bias is None:
            return out * s
        # The base gets the bias, for it may read what it adds to; s is not the bias's.
        own = operators.dense_bias(self.base, bias).astype(x.dtype)
        return (out - own) * s + own

    def dense(self) -> jax.Array:
        """R times the kernel, the columns scaled; in float32, rounded once to the type of the base."""
        kernel = operators.dense(self.base).astype(jnp.float32)
        columns = jnp.swapaxes(kernel, -1, -2)
        for i in range(self.blocks.shape[-4]):
            # R W is (W.T R.T).T, and R.T has the transposed blocks in the opposite order.
            columns = butterfly(columns, jnp.swapaxes(self.blocks[..., i, :, :, :], -1, -2), i)
        out = jnp.swapaxes(columns, -1, -2)
        return (out if self.s is None else out * self.s[..., None, :]).astype(self.dtype)


def butterfly(x: jax.Array, blocks: jax.Array, level: int) -> jax.Array:
    """x [..., rows, in] times one factor; blocks [..., in / block, block, block] -> the shape of x.

    At level i half-blocks that lie 2^i apart are brought together, rotated, and put back.
    """
    count, size = blocks.shape[-3:-1]
    half, apart, shape = size // 2, 2**level, x.shape
    if level:
        x = x.reshape(*shape[:-1], -1, 2, apart, half).swapaxes(-3, -2)
    x = x.reshape(*shape[:-1], count, size)
    lead = blocks.ndim - 3
    x = jnp.einsum("...rk,rkc->...rc", x, blocks) if not lead else jnp.einsum("l...rk,lrkc->l...rc", x, blocks)
    if level:
        x = x.reshape(*shape[:-1], -1, apart, 2, half).swapaxes(-3, -2)
    return x.reshape(shape)


def cayley(skew: jax.Array) -> jax.Array:
    """(I - Q)(I + Q)^-1 of skew-symmetric Q [..., block, block]: orthogonal."""
    eye = jnp.eye(skew.shape[-1], dtype=skew.dtype)
    return jnp.linalg.solve(eye + skew, eye - skew)


def cayley_series(skew: jax.Array, terms: int) -> jax.Array:
    """The first ``terms`` of (I + Q)(I - Q)^-1 = I + 2 Q + 2 Q² + ..., as PEFT cuts it: the last has no factor 2."""
    power, total = skew, jnp.eye(skew.shape[-1], dtype=skew.dtype) + 2.0 * skew
    for _ in range(2, terms - 1):
        power = power @ skew
        total = total + 2.0 * power
    return total + power @ skew


def oft(
    targets: str | list[str] = "/layers/**/kernel",
    block_size: int = 32,
    block_share: bool = False,
    neumann: bool = True,
    terms: int = 5,
    layers: str | int | None = None,
) -> Method:
    """Rotates blocks of each kernel's input. PEFT's constrained variant and its dropout of blocks are not here.

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      block_size: width of a block; it divides the input of every kernel.
      block_share: one rotation for all blocks of a kernel.
      neumann: the Cayley transform by its series, orthogonal to order Q^(terms-1) and free of a solve; else exactly.
        As in PEFT the two turn opposite ways.
      terms: of the series, the identity included; at least 4.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: block_size below 2 or terms below 4.
      TargetError (from init): nothing matched, what matched is no kernel, or block_size does not divide its input.
    """
    if block_size < 2 or terms < 4:
        raise errors.ConfigError(f"oft: block_size is {block_size}, terms {terms}; at least 2 and 4 are needed")
    rows, columns = np.triu_indices(block_size, 1)

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, fan_in, _ = kernel.shape
        _check_divides("oft", fan_in, block_size)
        count = 1 if block_share else fan_in // block_size
        return {"skew": jnp.zeros((*lead, count, len(rows)), jnp.float32)}

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Rotated:
        upper = arrays["skew"]
        square = jnp.zeros((*upper.shape[:-1], block_size, block_size), upper.dtype).at[..., rows, columns].set(upper)
        skew = square - jnp.swapaxes(square, -1, -2)
        blocks = cayley_series(skew, terms) if neumann else cayley(skew)
        count = kernel.shape[-2] // block_size
        blocks = jnp.broadcast_to(blocks, (*blocks.shape[:-3], count, block_size, block_size))
        return Rotated(kernel, blocks[..., None, :, :, :])

    return methods.per_site("oft", targets, new, wrap, layers=layers)


def boft(
    targets: str | list[str] = "/layers/**/kernel",
    block_size: int = 4,
    factors: int = 1,
    layers: str | int | None = None,
) -> Method:
    """Rotates each kernel's input by a product of butterfly factors, and scales its output (arXiv:2311.06243).

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      block_size: width of a block.
      factors: number of butterfly factors m; block_size · 2^(m-1) divides the input of every kernel.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: block_size below 2, factors below 1, or an odd block_size with several factors.
      TargetError (from init): nothing matched, what matched is no kernel, or the blocks do not divide its input.
    """
    if block_size < 2 or factors < 1:
        raise errors.ConfigError(f"boft: block_size is {block_size}, factors {factors}; at least 2 and 1 are needed")
    if factors > 1 and block_size % 2:
        raise errors.ConfigError(f"boft: block_size is {block_size}; with several factors it must be even")

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, fan_in, fan_out = kernel.shape
        _check_divides("boft", fan_in, block_size * 2 ** (factors - 1))
        square = (*lead, factors, fan_in // block_size, block_size, block_size)
        return {"r": jnp.zeros(square, jnp.float32), "s": jnp.ones((*lead, fan_out), jnp.float32)}

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Rotated:
        skew = 0.5 * (arrays["r"] - jnp.swapaxes(arrays["r"], -1, -2))
        return Rotated(kernel, cayley(skew), arrays["s"])

    return methods.per_site("boft", targets, new, wrap, layers=layers, axes={"s": ("out",)})


def _check_divides(name: str, fan_in: int, size: int) -> None:
    if fan_in % size:
        near = max(d for d in range(1, min(size, fan_in) + 1) if fan_in % d == 0)
        raise errors.TargetError(
            f"{name}: blocks of {size} do not divide a kernel's input of {fan_in}; the nearest that do are of {near}"
        )
