"""A stack of equal blocks, stored stacked in segments and run by `jax.lax.scan`."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tunejax.core import errors, sites
from tunejax.core.paths import Params
from tunejax.models import modules
from tunejax.models.blueprint import Blueprint, Noise
from tunejax.models.config import ModelConfig
from tunejax.models.view import View

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
HIDDEN_AXES = ("batch", "length", None)

REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass keeps of a block: everything; its input; every product; products with kernels only."""

TAPS = ("hidden", "attention", "mlp", "query", "key", "value")
"""What can be tapped of each block: its output; its two branches before they join the residual, and before what stands
in the slots there; what attention multiplies, [batch, length, heads (kv_heads), head_dim], normed and rotated."""


class Block(nnx.Module):
    """What a stack is made of: attention, MLP and the gate of both branches; a subclass says how they join."""

    def __init__(self, config: ModelConfig, *, dtype: Any, noise: Noise) -> None:
        self.rate = config.dropout
        self.attention = modules.Attention(config, dtype=dtype, noise=noise)
        self.mlp = modules.Mlp(config, dtype=dtype, noise=noise)
        self.gate = nnx.Param(None)

    def __call__(self, x: jax.Array, view: View, cache: Any, key: Any) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """x [batch, length, embed] -> the same shape, the layer's new cache, and each of `TAPS` but "hidden"."""
        raise NotImplementedError


def sizes(depth: int, cuts: Sequence[int]) -> list[int]:
    """Layers in each segment. Raises ConfigError for a cut outside the stack."""
    for cut in cuts:
        if not 0 <= cut <= depth:
            raise errors.ConfigError(f"cuts: {cut} is outside the stack of {depth} layers")
    edges = sorted({0, depth, *cuts})
    return [b - a for a, b in itertools.pairwise(edges)]


def init(block: Blueprint, sizes: Sequence[int], key: Any) -> Params:
    """Fresh segments; layer i's values do not depend on where the stack is cut."""
    keys = jax.random.split(key, sum(sizes))
    out, start = {}, 0
    for name, size in enumerate(sizes):
        out[str(name)] = jax.lax.map(block.init, keys[start : start + size])
        start += size
    return out


def prefix_length(layers: Mapping[str, Params]) -> int:
    """How many positions prefixes take before the text, in the layer where they take the most."""
    filled = [p for segment in layers.values() if (p := segment["attention"]["prefix"]) is not None]
    return max((sites.taken(p) for p in filled), default=0)


def run(
    block: Blueprint,
    layers: Mapping[str, Params],
    x: jax.Array,
    view: View,
    *,
    cache: Mapping[str, Any] | None,
    key: Any,
    taps: Sequence[str],
    remat: str,
    constrain: Constrain,
) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
    """x [batch, length, embed] through all blocks.

    Returns:
      the output, the cache's new layers (empty without one), and each tap [layers, batch, length, ...].
    """
    for name in taps:
        if name not in TAPS:
            raise errors.ConfigError(f"tap {name!r} is not known. {errors.did_you_mean(name, TAPS)}")

    def body(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        params, layer_cache, layer_key = xs
        x, layer_cache, tapped = block.merge(params)(x, view, layer_cache, layer_key)
        x = constrain(x, HIDDEN_AXES)
        tapped["hidden"] = x
        return x, (layer_cache, {name: tapped[name] for name in taps})

    body = checkpointed(body, remat)
    new_cache: dict[str, Any] = {}
    tapped: list[dict[str, jax.Array]] = []
    start = 0
    for name, params in sorted(layers.items(), key=lambda item: int(item[0])):
        size = jax.tree.leaves(params)[0].shape[0]
        keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(start, start + size))
        x, (new_cache[name], out) = jax.lax.scan(body, x, (params, cache and cache[name], keys))
        tapped.append(out)
        start += size
    joined = {name: jnp.concatenate([out[name] for out in tapped]) for name in taps}
    return x, new_cache if cache is not None else {}, joined


def checkpointed(body: Callable, remat: str) -> Callable:
    """``body`` of a scan, computed again in the backward pass as `REMAT` says. Raises ConfigError for no policy."""
    if remat not in REMAT:
        raise errors.ConfigError(f"remat: {remat!r} is not a policy. {errors.did_you_mean(remat, REMAT)}")
    return body if remat == "none" else jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
