"""What the attention of every block needs besides its input, made once outside the scan."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import sites
from tunejax.models import rope
from tunejax.models.config import ModelConfig


class View(NamedTuple):
    """Where the queries and keys stand, who sees whom, and the rotation of the new positions.

    seen: float32 [batch, queries, keys], 0 where seen and very negative elsewhere (`sites.bias`).
    rotation: of `rope.angles`, or None.
    slot: of the cache, that the first new token takes, or None without a cache.
    """

    q_where: sites.Where
    kv_where: sites.Where
    seen: jax.Array
    rotation: tuple[jax.Array, jax.Array] | None
    causal: bool
    slot: jax.Array | None

    def write(self, old: jax.Array, new: jax.Array) -> jax.Array:
        """``old`` [batch, slots, ...] with ``new`` [batch, queries, ...] written from ``slot`` on."""
        return write(old, new, self.slot)


def write(old: jax.Array, new: jax.Array, index: Any) -> jax.Array:
    """``old`` [batch, slots, ...] with ``new`` [batch, queries, ...] from slot ``index`` on, in the type of old."""
    start = (0, index) + (0,) * (old.ndim - 2)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)


def where(batch: Mapping[str, jax.Array], before: int = 0) -> sites.Where:
    """Where a batch's tokens stand; without segment_ids all are real, without positions they count from 0.

    before: positions that a prefix takes; all tokens stand as many further on.
    """
    tokens = batch["tokens"]
    segment_ids = batch.get("segment_ids")
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    positions = batch.get("positions")
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
    return sites.Where(positions + before, segment_ids)


def make(config: ModelConfig, q_where: sites.Where, cache: Mapping[str, Any] | None) -> View:
    """The view of new tokens at ``q_where``; with a cache, its positions and segment_ids already hold theirs."""
    causal = config.kind == "decoder"
    kv_where = q_where if cache is None else sites.Where(cache["positions"], cache["segment_ids"])
    seen = sites.bias(sites.mask(q_where, kv_where, causal=causal, window=config.sliding_window))
    rotation = rope.angles(config, q_where.positions) if config.position == "rope" else None
    return View(q_where, kv_where, seen, rotation, causal, None if cache is None else cache["index"])
