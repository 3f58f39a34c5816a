"""Rotary position embeddings: plain, linearly scaled, and the scaling of Llama 3."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors
from tunejax.models.config import ModelConfig

NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The scalings that are known, and the entries of config.json's rope_scaling that each reads."""


def check(scaling: Mapping[str, Any]) -> str:
    """The kind of scaling. Raises CheckpointError for an unknown kind or a missing entry."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in NEEDS:
        near = errors.did_you_mean(kind, NEEDS)
        raise errors.CheckpointError(f"rope_scaling: rope_type {kind!r} is not supported. {near}")
    missing = [k for k in NEEDS[kind] if k not in scaling]
    if missing:
        raise errors.CheckpointError(f"rope_scaling of rope_type {kind!r} lacks {', '.join(missing)}")
    return kind


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position of each pair of entries of a head, float32 [head_dim / 2]. Raises as `check`."""
    scaling = dict(config.rope_scaling or ())
    kind = check(scaling)
    plain = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim)
    if kind == "llama3":
        return _llama3(plain, scaling)
    return (plain / scaling["factor"] if kind == "linear" else plain).astype(np.float32)


def _llama3(plain: np.ndarray, scaling: dict) -> np.ndarray:
    """Slow frequencies divided by ``factor``, fast ones kept, those between interpolated (Llama 3.1's release)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (keep * plain + (1.0 - keep) * plain / scaling["factor"]).astype(np.float32)


def angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `rotate` takes for positions [batch, length]: cos and (-sin, sin), float32.

    Returns:
      [batch, length, 1, 1, head_dim / 2] and [batch, length, 1, 2, head_dim / 2], the same for every head.
    """
    theta = positions[..., None, None, None].astype(jnp.float32) * frequencies(config)
    sin = jnp.sin(theta)
    return jnp.cos(theta), jnp.concatenate([-sin, sin], axis=-2)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [batch, length, heads, head_dim] with entry i and entry i + head_dim / 2 turned together, in float32."""
    cos, sin = rotation
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    # A reversal is fused into the products around it; a concatenation is a pass of its own, in both directions.
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)
