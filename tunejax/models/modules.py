"""The modules that the decoder and the encoder share. They hold slots; all arithmetic on kernels is in core.sites."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tunejax.core import errors, masked, sites
from tunejax.core.activations import ACTIVATIONS
from tunejax.models import rope
from tunejax.models.blueprint import Noise
from tunejax.models.config import ModelConfig
from tunejax.models.view import View


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of that name. Raises CheckpointError for an unknown one."""
    if name not in ACTIVATIONS:
        raise errors.CheckpointError(f"activation {name!r} is not known. {errors.did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def init_scale(config: ModelConfig) -> float:
    """Standard deviation of fresh kernels and tables: config.json's initializer_range, or 0.02."""
    return float(dict(config.extra).get("initializer_range", 0.02))


def normal(noise: Noise, shape: tuple[int, ...], std: float, dtype: Any) -> nnx.Param:
    """A slot of fresh normal values with standard deviation ``std``."""
    return nnx.Param((std * noise(shape)).astype(dtype))


class Linear(nnx.Module):
    """kernel [in, out], and bias [out] or an empty slot."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool, *, std: float, dtype: Any, noise: Noise) -> None:
        self.kernel = normal(noise, (fan_in, fan_out), std, dtype)
        self.bias = nnx.Param(jnp.zeros((fan_out,), dtype) if bias else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        return sites.linear(self.kernel.get_value(), x, self.bias.get_value())


class Table(nnx.Module):
    """table [rows, embed]."""

    def __init__(self, rows: int, config: ModelConfig, *, dtype: Any, noise: Noise) -> None:
        self.table = normal(noise, (rows, config.embed_dim), init_scale(config), dtype)

    def __call__(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """ids [...] -> [..., embed] in ``dtype``."""
        return sites.lookup(self.table.get_value(), ids, dtype)


def rms_norm(x: jax.Array, scale: Any, eps: float) -> jax.Array:
    """x [..., dim] over its root mean square, times scale [dim]; in float32, returned in the type of x."""
    scale, mask, seen = masked.over(scale)
    y, mean = _kept(x, mask)
    y = y * jax.lax.rsqrt(mean(jnp.square(y)) + eps)
    return masked.through(y * scale.astype(jnp.float32), mask, seen).astype(x.dtype)


def layer_norm(x: jax.Array, scale: Any, bias: jax.Array, eps: float) -> jax.Array:
    """x [..., dim] with mean 0 and variance 1, times scale plus bias; in float32, returned in the type of x."""
    scale, mask, seen = masked.over(scale)
    y, mean = _kept(x, mask)
    y, _ = _kept(y - mean(y), mask)
    y = y * jax.lax.rsqrt(mean(jnp.square(y)) + eps)
    y = y * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return masked.through(y, mask, seen).astype(x.dtype)


def _kept(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """x in float32 with zeros where it is masked, and the mean of such values over kept entries."""
    y = x.astype(jnp.float32)
    if mask is None:
        return y, lambda v: jnp.mean(v, axis=-1, keepdims=True)
    mask = jax.lax.stop_gradient(mask)
    count = jnp.sum(mask)
    return y * mask, lambda v: jnp.sum(v, axis=-1, keepdims=True) / count


class Norm(nnx.Module):
    """Root-mean-square norm (scale), or layer norm (scale, bias), computed in float32."""

    def __init__(self, dim: int, kind: str, eps: float, *, dtype: Any) -> None:
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        if kind == "layer":
            self.bias = nnx.Param(jnp.zeros((dim,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., dim] -> the same shape and type."""
        scale = self.scale.get_value()
        if self.kind == "layer":
            return layer_norm(x, scale, self.bias.get_value(), self.eps)
        return rms_norm(x, scale, self.eps)


class Attention(nnx.Module):
    """Multi-head attention with grouped key/value heads; ``norm`` stands before it (decoder) or after (encoder).

    join: the slot of `sites.join`, which the block uses.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any, noise: Noise) -> None:
        c = config
        self.config = c
        q_dim, kv_dim = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        made = {"std": init_scale(c), "dtype": dtype, "noise": noise}
        self.norm = Norm(c.embed_dim, c.norm, c.norm_eps, dtype=dtype)
        self.q = Linear(c.embed_dim, q_dim, c.attention_bias[0], **made)
        self.k = Linear(c.embed_dim, kv_dim, c.attention_bias[1], **made)
        self.v = Linear(c.embed_dim, kv_dim, c.attention_bias[2], **made)
        self.o = Linear(q_dim, c.embed_dim, c.attention_bias[3], **made)
        if c.qk_norm:
            self.q_norm = Norm(c.head_dim, "rms", c.norm_eps, dtype=dtype)
            self.k_norm = Norm(c.head_dim, "rms", c.norm_eps, dtype=dtype)
        self.prefix = nnx.Param(None)
        self.join = nnx.Param(None)

    def __call__(self, x: jax.Array, view: View, cache: Any = None) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """x [batch, length, embed] -> (the same shape, the layer's cache with the new keys and values in it, taps)."""
        c = self.config
        heads = (*x.shape[:2], -1, c.head_dim)
        q, k, v = (site(x).reshape(heads) for site in (self.q, self.k, self.v))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if view.rotation is not None:
            q, k = rope.rotate(q, view.rotation), rope.rotate(k, view.rotation)
        taps = {"query": q, "key": k, "value": v}
        if cache is not None:
            cache = {"k": view.write(cache["k"], k), "v": view.write(cache["v"], v)}
            k, v = cache["k"].astype(q.dtype), cache["v"].astype(q.dtype)
        prefix = self.prefix.get_value()
        out = sites.attention(
            q,
            k,
            v,
            view.q_where,
            view.kv_where,
            causal=view.causal,
            window=c.sliding_window,
            prefix=sites.pair(prefix, x, c.head_dim),
            strength=sites.strength(prefix, x),
            seen=view.seen,
        )
        return self.o(out.reshape(*x.shape[:2], -1)), cache, taps


class Mlp(nnx.Module):
    """act(x gate) * (x up), or act(x up); then down. ``norm`` and ``join`` as in `Attention`."""

    def __init__(self, config: ModelConfig, *, dtype: Any, noise: Noise) -> None:
        c = config
        made = {"std": init_scale(c), "dtype": dtype, "noise": noise}
        self.act = c.activation
        self.norm = Norm(c.embed_dim, c.norm, c.norm_eps, dtype=dtype)
        self.gated = c.gated_mlp
        if c.gated_mlp:
            self.gate = Linear(c.embed_dim, c.mlp_dim, c.mlp_bias, **made)
        self.up = Linear(c.embed_dim, c.mlp_dim, c.mlp_bias, **made)
        self.down = Linear(c.mlp_dim, c.embed_dim, c.mlp_bias, **made)
        self.join = nnx.Param(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., embed] -> [..., embed]."""
        act = activation(self.act)
        return self.down(act(self.gate(x)) * self.up(x) if self.gated else act(self.up(x)))


def dropout(x: jax.Array, rate: float, key: Any) -> jax.Array:
    """x with entries zeroed at ``rate`` and the others scaled up; ``x`` itself where ``key`` is None or the rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
