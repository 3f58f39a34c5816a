"""The five sites that models are made of: linear, lookup (with attend), attention, gate, join.

A site takes what stands in its slot, an array or an operator, and works in the type of its input.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import operators

linear = operators.apply


def lookup(table: Any, ids: jax.Array, dtype: Any = None) -> jax.Array:
    """Rows of a table [vocab, embed] (or of an operator with ``lookup``) by ids [...] -> [..., embed]."""
    rows = table.lookup(ids) if operators.is_operator(table) else jnp.take(table, ids, axis=0, mode="clip")
    return rows if dtype is None else rows.astype(dtype)


def attend(table: Any, x: jax.Array) -> jax.Array:
    """Tied output head: x [..., embed] against every row of the table [vocab, embed] -> [..., vocab]."""
    if operators.is_operator(table):
        return table.attend(x)
    return jax.lax.dot_general(x, table.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def gate(value: Any, branch: jax.Array) -> jax.Array:
    """A residual branch times the scalar of its block's gate; an empty slot leaves it as it is."""
    return branch if value is None else branch * value.astype(branch.dtype)


def blend(value: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    """A block's gate where a norm follows the branch: ``new`` at 1, ``old`` at 0 (what came in); an empty slot is 1."""
    if value is None:
        return new
    weight = value.astype(new.dtype)
    return weight * new + (1 - weight) * old


def join(
    slot: Any, branch: jax.Array, residual: jax.Array, norm: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """What a block's branch adds to ``residual``, each [..., embed]: ``branch``, where the slot is empty.

    norm: what the block does to the sum, where it does anything.
    """
    return branch if slot is None else slot.joined(branch, residual, norm)


def strength(prefix: Any, x: jax.Array) -> jax.Array | None:
    """How much more or less than a key of the text each query of x [batch, length, embed] sees of the prefix."""
    return prefix.strength(x) if operators.is_operator(prefix) else None


def pair(prefix: Any, x: jax.Array, head_dim: int) -> tuple[jax.Array, ...] | None:
    """The slot's (key, value) for `attention`, each [n, kv_heads, head_dim], or one a row of x [batch, ...]."""
    if prefix is None:
        return None
    if not operators.is_operator(prefix):
        return tuple(p.reshape(len(p), -1, head_dim) for p in prefix)
    return tuple(p.reshape(*p.shape[:-1], -1, head_dim) for p in prefix.pair(x))


def taken(prefix: Any) -> int:
    """How many positions before the text a stack's filled slot takes: [layers, n, ...] each."""
    return prefix.taken if operators.is_operator(prefix) else next(iter(prefix)).shape[1]


class Where(NamedTuple):
    """Where each query or key stands: positions and segment_ids, each [batch, length]. Segment 0 is padding."""

    positions: jax.Array
    segment_ids: jax.Array


def mask(q: Where, kv: Where, *, causal: bool, window: int | None = None) -> jax.Array:
    """[batch, queries, keys] bool: who sees whom: the same segment, not padding, not later, not beyond the window."""
    seen = (q.segment_ids[:, :, None] == kv.segment_ids[:, None, :]) & (kv.segment_ids[:, None, :] > 0)
    distance = q.positions[:, :, None] - kv.positions[:, None, :]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return seen


HIDDEN = -1e30
"""Added to the score of a key that is not seen. Finite, so a query that sees nothing gets no NaN."""


def bias(seen: jax.Array) -> jax.Array:
    """A bool `mask` as float32 to add to scores, for `attention`'s ``seen``: one select for all layers."""
    return jnp.where(seen, 0.0, HIDDEN).astype(jnp.float32)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    q_where: Where,
    kv_where: Where,
    *,
    causal: bool,
    window: int | None = None,
    prefix: tuple[jax.Array, ...] | None = None,
    strength: jax.Array | None = None,
    scale: float | None = None,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention in float32 with grouped key/value heads.

    Args:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, kv_heads, head_dim]; kv_heads divides heads.
      q_where, kv_where: where queries and keys stand.
      causal: a query sees no later position of its segment. With as many keys as queries (no cache), positions of a
        segment must rise with the slots that they stand in.
      window: it sees at most this many positions back, itself included (sliding window).
      prefix: trained (key, value), each [prefix, kv_heads, head_dim], or with a batch axis before, that every query
        sees.
      strength: float32 [batch, queries], added to each query's scores of the prefix.
      scale: of the products; 1 / sqrt(head_dim) unless told.
      seen: the `mask`, or its `bias`, where the caller has made it once for all layers.

    Returns:
      [batch, queries, heads, head_dim]. A query that sees nothing (padding) gets a finite value.
    """
    batch, queries, _, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    seen = mask(q_where, kv_where, causal=causal, window=window) if seen is None else seen
    seen = bias(seen) if seen.dtype == jnp.bool_ else seen
    ordered = causal and key.shape[1] == queries
    before = 0
    if prefix is not None:
        front = [jnp.broadcast_to(p.astype(key.dtype), (batch, *p.shape[-3:])) for p in prefix]
        before = front[0].shape[1]
        key, value = (jnp.concatenate(pair, axis=1) for pair in zip(front, (key, value), strict=True))
        shape = (*seen.shape[:2], before)
        scores = jnp.zeros(shape) if strength is None else jnp.broadcast_to(strength[..., None], shape)
        seen = jnp.concatenate([scores.astype(seen.dtype), seen], axis=2)
    if jax.default_backend() != "cpu" and strength is None:  # the fused kernels take a mask, no scores
        return _fused(query, key, value, seen, scale)
    if not ordered or queries < 2 * BLOCK:
        return _attend(query, key, value, seen, scale)
    # Queries a block at a time, each with no key after the block: half the products and a softmax that fits the cache.
    size = max(BLOCK, -(-queries // BLOCKS))
    blocks = [(i, min(i + size, queries)) for i in range(0, queries, size)]
    out = [
        _attend(query[:, i:j], key[:, : before + j], value[:, : before + j], seen[:, i:j, : before + j], scale)
        for i, j in blocks
    ]
    return jnp.concatenate(out, axis=1)


BLOCK, BLOCKS = 256, 8
"""Queries that the CPU path takes at a time, at least; and how often, at most, since each costs compile time."""


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    groups = heads // kv_heads
    # Heads before positions, and the queries of a group beside each other: what a product of many matrices takes and
    # gives. In any other order XLA transposes the scores after one product and before the next.
    query = (query * scale).reshape(batch, queries, kv_heads, groups, head_dim).swapaxes(1, 2)
    query, key, value = query.reshape(batch, kv_heads, -1, head_dim), key.swapaxes(1, 2), value.swapaxes(1, 2)
    seen = jnp.broadcast_to(seen[:, :, None], (batch, queries, groups, keys)).reshape(batch, 1, -1, keys)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores += seen
    # The softmax is divided by its sum behind the product with the values, where there is less to divide.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(value.dtype)
    out = out.reshape(batch, kv_heads, queries, groups, head_dim)
    return out.swapaxes(1, 2).reshape(batch, queries, heads, head_dim)


def _fused(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    head_dim = query.shape[-1]
    half = all(x.dtype in (jnp.bfloat16, jnp.float16) for x in (query, key, value))
    cudnn = jax.default_backend() == "gpu" and half and head_dim % 8 == 0 and head_dim <= 128
    return jax.nn.dot_product_attention(
        query, key, value, mask=seen[:, None] >= 0, scale=scale, implementation="cudnn" if cudnn else "xla"
    )
