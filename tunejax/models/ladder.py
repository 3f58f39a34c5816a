"""Runs what fills the slot ``ladder`` (`core.ladder`): narrow blocks of the model's own kind beside the stack."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, operators
from tunejax.core.ladder import Ladder
from tunejax.models import rope, stack
from tunejax.models.blueprint import blueprint
from tunejax.models.config import ModelConfig
from tunejax.models.view import View


def narrowed(config: ModelConfig, width: int) -> ModelConfig:
    """``config`` with every width divided by embed_dim / width; the number of heads stays.

    Raises:
      ConfigError: some width is not a multiple of it, or heads become odd that must be rotated.
    """
    factor, rest = divmod(config.embed_dim, width)
    even = 2 if config.position == "rope" else 1
    if rest or config.mlp_dim % factor or config.head_dim % (even * factor):
        raise errors.ConfigError(
            f"a ladder of width {width} divides every width by {config.embed_dim / width:g}, which embed_dim "
            f"{config.embed_dim}, head_dim {config.head_dim} and mlp_dim {config.mlp_dim} do not allow"
        )
    return dataclasses.replace(
        config, embed_dim=width, head_dim=config.head_dim // factor, mlp_dim=config.mlp_dim // factor
    )


def run(
    block_type: type[stack.Block],
    config: ModelConfig,
    ladder: Ladder,
    first: jax.Array,
    states: jax.Array,
    view: View,
    *,
    cache: Any,
    remat: str,
    constrain: stack.Constrain,
) -> tuple[jax.Array, Any]:
    """What the ladder adds to the last state, and its new cache. Dropout is off in it.

    Args:
      first: input of the stack, [batch, length, embed].
      states: output of each of its blocks, [layers, batch, length, embed].
      view: of the stack; positions are the same here.
      cache: {"k", "v"} of its own, each [layers, batch, slots, kv_heads, head_dim / r], or None.

    Returns:
      [batch, length, embed], and the cache with the new keys and values in it.
    """
    narrow = narrowed(config, ladder.up.shape[0])
    block = blueprint(lambda noise: block_type(narrow, dtype=jnp.float32, noise=noise), flat=True)
    if view.rotation is not None:
        view = view._replace(rotation=rope.angles(narrow, view.q_where.positions))

    def body(s: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        params, state, (down, weight), layer_cache = xs
        weight = weight.astype(s.dtype)
        s = weight * operators.apply(down, state) + (1 - weight) * s
        s, layer_cache, _ = block.merge(params)(s, view, layer_cache, None)
        return constrain(s, stack.HIDDEN_AXES), layer_cache

    xs = (ladder.blocks, states, ladder.rung(), cache)
    s, cache = jax.lax.scan(stack.checkpointed(body, remat), operators.apply(ladder.first, first), xs)
    return operators.apply(ladder.up, s), cache


def empty(config: ModelConfig, ladder: Ladder, like: dict[str, Any]) -> dict[str, jax.Array]:
    """An empty cache for the ladder, beside ``like``, the caches of the stack's segments."""
    narrow, layers = narrowed(config, ladder.up.shape[0]), list(like.values())
    depth, slots = sum(x["k"].shape[0] for x in layers), layers[0]["k"]
    shape = (depth, *slots.shape[1:-1], narrow.head_dim)
    return {"k": jnp.zeros(shape, slots.dtype), "v": jnp.zeros(shape, slots.dtype)}
