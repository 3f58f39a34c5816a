"""The cache of keys and values for decoding: a plain pytree."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from tunejax.core import sites
from tunejax.models import view
from tunejax.models.config import ModelConfig

Cache = dict[str, Any]


def empty(config: ModelConfig, sizes: Sequence[int], batch: int, length: int, dtype: Any) -> Cache:
    """A cache with ``length`` free slots a row for segments of these sizes.

    Slots fill from ``index`` on, the same for all rows; a free slot has segment 0, so nothing sees it.
    """
    layers = {}
    for name, size in enumerate(sizes):
        shape = (size, batch, length, config.num_kv_heads, config.head_dim)
        layers[str(name)] = {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}
    return {
        "index": jnp.zeros((), jnp.int32),
        "positions": jnp.zeros((batch, length), jnp.int32),
        "segment_ids": jnp.zeros((batch, length), jnp.int32),
        "layers": layers,
    }


def enter(cache: Cache, new: sites.Where) -> Cache:
    """The cache with the new tokens' positions and segments in their slots; ``index`` still points at the first."""
    index = cache["index"]
    return {
        **cache,
        "positions": view.write(cache["positions"], new.positions, index),
        "segment_ids": view.write(cache["segment_ids"], new.segment_ids, index),
    }


def leave(cache: Cache, layers: dict[str, Any], length: int) -> Cache:
    """The cache with the layers' new keys and values, and ``index`` past the ``length`` new tokens."""
    return {**cache, "layers": layers, "index": cache["index"] + length}
