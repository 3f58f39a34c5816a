"""A model as the rest of tunejax sees it: four pure functions of a plain parameter dict."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core.method import Axes
from tunejax.core.paths import Params, Path

Batch = Mapping[str, jax.Array]
"""What every model and objective reads, each [batch, length]:

tokens int32; targets int32 (already shifted: ``targets[b, t]`` is what position t predicts); loss_weights float32
(0: not in the loss); positions int32 (restart at 0 in every packed example); segment_ids int32 (0 is padding,
1, 2, ... the packed examples of a row: positions attend within their own only). Encoders may also find token_types.
"""

AUXILIARY = "auxiliary"
"""Key of params for what an objective trains of its own; no model reads it."""


class Model(NamedTuple):
    """A blueprint turned into pure functions. The parameters are an argument of each, never a part of it.

    init:   (key) -> params.
    hidden: (params, batch, *, cache=None, taps=(), key=None) -> (hidden [batch, length, embed], aux). ``aux`` holds
            each tap [layers, batch, length, ...] by name, and "cache" where one came in. Dropout is on iff a key comes.
    head:   (params) -> the part of params that `logits` reads.
    logits: (params or head(params), hidden [..., embed]) -> [..., vocab or labels]. The loss calls it in chunks.
    cache:  (batch, length, dtype) -> an empty cache for decoding, or None for an encoder.
    axes:   logical axes of each leaf, by path.
    vocab_size, depth: rows of the vocabulary; layers of the stack.
    """

    init: Callable[[Any], Params]
    hidden: Callable[..., tuple[jax.Array, dict[str, Any]]]
    head: Callable[[Params], Params]
    logits: Callable[[Params, jax.Array], jax.Array]
    cache: Callable[[int, int, Any], Any] | None
    axes: dict[Path, Axes]
    vocab_size: int
    depth: int


def key_shape() -> Any:
    """The shape of a PRNG key, for `jax.eval_shape`. Making a key compiles two programs."""
    return jax.eval_shape(jax.random.key, 0)


def full_batch(tokens: jax.Array, attention_mask: jax.Array | None = None) -> dict[str, jax.Array]:
    """A batch of one example a row. tokens, attention_mask [batch, length] (1: a token, 0: padding on either side)."""
    mask = jnp.ones_like(tokens) if attention_mask is None else attention_mask.astype(jnp.int32)
    return {"tokens": tokens, "segment_ids": mask, "positions": jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)}
