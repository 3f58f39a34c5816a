"""The low-rank product beside a kernel, which LoRA and its relatives share, and what they draw and accept.

    y = x W + scale · (x A) B        A [in, rank], B [rank, out]

PEFT stores both transposed: its lora_A is A.T [rank, in], its lora_B is B.T [out, rank].
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import combine, errors, operators, portable

ALIASES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rslora",
    "layers_to_transform": "layers",
}
"""What PEFT calls it -> what it is in every low-rank method here."""

ENTRIES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}
"""Argument -> its entry in PEFT's LoraConfig."""

AXES: dict[str, tuple[str | None, ...]] = {"a": ("in", None), "b": (None, "out")}
"""`core.method.per_site`'s ``axes`` of the factors."""


@operators.operator
class LowRank(operators.Added):
    """base(x) + scale · (dropout(x) a) b.

    base: kernel [..., in, out], or an operator that stands for one. a [..., in, rank]; b [..., rank, out].
    key: [...] PRNG keys of the dropout, one a layer, or None where there is none. apart: never as one with the base.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    key: Any = None
    scale: float = operators.static(default=1.0)
    dropout: float = operators.static(default=0.0)
    apart: bool = operators.static(default=False)

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        if self._summed(x):
            out = summed(self.scale, x.reshape(-1, x.shape[-1]), self.base, self.a, self.b)
            out = out.reshape(*x.shape[:-1], -1)
            return out if bias is None else out + bias.astype(x.dtype)
        return super().__call__(x, bias)

    def parts(self, x: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """What the base gives, and what is added to it; each [..., out]."""
        narrow = project(drop(x, self.dropout, self.key), self.a)
        return operators.apply(self.base, x, bias), (self.scale * narrow) @ self.b.astype(x.dtype)

    def _summed(self, x: jax.Array) -> bool:
        """Whether one product with base + scale · a b is exact and cheaper than two: on the CPU, all in float32."""
        if (
            jax.default_backend() != "cpu"
            or self.apart
            or not operators.is_array(self.base)
            or (self.key is not None and self.dropout)
        ):
            return False
        fan_in, fan_out = self.base.shape[-2:]
        exact = x.dtype == self.base.dtype == self.a.dtype == jnp.float32
        return exact and self.a.ndim == 2 and x.size * (fan_in + fan_out) >= fan_in * fan_in * fan_out

    def delta(self) -> jax.Array:
        """scale · a b, which is added to the kernel [..., in, out]."""
        return self.scale * (self.a @ self.b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed(scale: float, x: jax.Array, base: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x (base + scale · a b) as one product; x [rows, in], base [in, out], a [in, rank], b [rank, out] -> [rows, out].

    The wide results of both products are then neither added nor kept, and no [in, out] gradient is formed unless the
    base trains: A's and B's come from narrow products, A's transposed so that x is read in its own order.
    """
    return x @ (base + scale * (a @ b))


def _summed_forward(scale: float, x: jax.Array, base: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    return summed(scale, x, base, a, b), (x, base, a, b)


def _summed_backward(scale: float, kept: Any, grad: jax.Array) -> tuple[jax.Array, ...]:
    x, base, a, b = kept
    to_narrow = scale * (grad @ b.T)
    # The base's is dropped from the program where the base is frozen.
    return grad @ (base + scale * (a @ b)).T, x.T @ grad, (to_narrow.T @ x).T, (scale * (x @ a)).T @ grad


summed.defvjp(_summed_forward, _summed_backward)


def project(x: jax.Array, a: jax.Array) -> jax.Array:
    """x [..., in] @ a [in, rank] -> [..., rank]. The one place to change how the narrow product differentiates."""
    return x @ a.astype(x.dtype)


def drop(x: jax.Array, rate: float, key: Any) -> jax.Array:
    """Inverted dropout; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))


def check(name: str, rank: int, dropout: float, alpha: float = 1.0) -> None:
    """Raises ConfigError: rank below 1, dropout outside [0, 1), or an alpha of 0 or that is no number."""
    if rank < 1:
        raise errors.ConfigError(f"{name}: rank is {rank}; it must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise errors.ConfigError(f"{name}: dropout is {dropout}; it must lie in [0, 1)")
    if not math.isfinite(alpha) or alpha == 0:
        raise errors.ConfigError(f"{name}: alpha is {alpha}; it must be a number other than 0")


def check_root(name: str, alpha: float) -> None:
    """Raises ConfigError: an alpha below 0, where a start is made of the root of the scale."""
    if alpha < 0:
        raise errors.ConfigError(f"{name}: alpha is {alpha}; it must be above 0, for its root is part of the start")


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def factors(key: Any, kernel: Any, rank: int) -> dict[str, jax.Array]:
    """{"a": uniform [..., in, rank], "b": zeros [..., rank, out]} for a kernel [..., in, out], in float32."""
    *lead, fan_in, fan_out = kernel.shape
    a = uniform(key, (*lead, fan_in, rank), 1.0 / math.sqrt(fan_in))  # kaiming_uniform_(a=sqrt(5)), as PEFT draws it
    return {"a": a, "b": jnp.zeros((*lead, rank, fan_out), jnp.float32)}


def uniform(key: Any, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Float32 of this shape, uniform between -bound and bound."""
    # Drawn flat: the same bits, and a program that compiles five times as fast.
    return jax.random.uniform(key, (math.prod(shape),), jnp.float32, -bound, bound).reshape(shape)


def normal(key: Any, shape: tuple[int, ...]) -> jax.Array:
    """Float32 of this shape, normal with variance 1; drawn flat, as `uniform`."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def beside(kernel: Any, a: Any, b: Any, ctx: Any, scale: float, dropout: float) -> LowRank:
    """The product at a kernel as a step binds it."""
    return LowRank(kernel, a, b, keys(ctx, kernel, dropout), scale=scale, dropout=dropout, apart=ctx.rows)


def keys(ctx: Any, kernel: Any, dropout: float) -> Any:
    """The operator's dropout keys, one a layer of the kernel; None where nothing is dropped."""
    if ctx.key is None or not ctx.train or not dropout:
        return None
    return jax.random.split(ctx.key, kernel.shape[0]) if len(kernel.shape) == 3 else ctx.key


def _fuse(
    parts: Sequence[portable.Arrays | None], widths: Sequence[int], arguments: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Products side by side are one of their ranks' sum, whose B is zero but for each part's own columns."""
    there = [p for p in parts if p is not None]
    rank, grown = there[0]["a"].shape[1], len(there)
    b, row, column = np.zeros((rank * grown, sum(widths)), np.float32), 0, 0
    for part, width in zip(parts, widths, strict=True):
        if part is not None:
            b[row : row + rank, column : column + width] = part["b"]
            row += rank
        column += width
    alpha = arguments["alpha"] * (math.sqrt(grown) if arguments.get("rslora") else grown)
    return {"a": np.concatenate([p["a"] for p in there], axis=1), "b": b}, {"rank": rank * grown, "alpha": alpha}


PEFT = portable.Form(
    "LORA",
    write=lambda arrays: {"lora_A.weight": arrays["a"].T, "lora_B.weight": arrays["b"].T},
    read=lambda tensors, _: {"a": tensors["lora_A.weight"].T, "b": tensors["lora_B.weight"].T},
    entries=ENTRIES,
    absent={"alpha": 8.0},
    patterns=True,
    biases="lora_only",
    fuse=_fuse,
    split=lambda arrays, i, of: {"a": arrays["a"], "b": np.split(arrays["b"], of, axis=1)[i]},
)
"""How PEFT keeps it; what trains and how fast is not part of that."""


HUB = portable.HubProduct(
    "lora",
    write=lambda arrays: {"lora_A": arrays["a"].T, "lora_B": arrays["b"].T},
    read=lambda tensors: {"a": tensors["lora_A"].T, "b": tensors["lora_B"].T},
    fuse=lambda parts: {k: np.concatenate([p[k] for p in parts], axis=1) for k in ("a", "b")},
    split=lambda arrays, i, of: {k: np.split(arrays[k], of, axis=1)[i] for k in ("a", "b")},
    scale=lambda arguments: scale_of(arguments["alpha"], arguments["rank"], arguments.get("rslora", False)),
)
"""How AdapterHub's library keeps it; the parts of one kernel have a rank each there, not the sum of them."""


PRODUCT = combine.Product(
    factors=lambda arrays: combine.Factors(arrays["a"], arrays["b"]),
    scale=lambda arguments: scale_of(arguments["alpha"], arguments["rank"], arguments.get("rslora", False)),
    scaled=("b",),
    varies=("rank", "alpha", "rslora"),
    plain=lambda rank: {"name": "lora", "rank": rank, "alpha": float(rank)},
)
"""How several of them combine."""
