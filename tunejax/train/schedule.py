"""Learning rates over time, by the names and the formulas that users of Hugging Face know.

Each schedule is (update: int32) -> factor of the learning rate; update 0 is the first. Warm-up rises from 0 at
update 0 to 1 at update ``warmup``, as in `transformers.optimization`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors

Schedule = Callable[[Any], jax.Array]

ALIASES = {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd", "cosine_with_min_lr": "cosine"}
NAMES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def make_schedule(
    name: str,
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    decay_ratio: float = 0.1,
    min_lr_ratio: float = 0.0,
) -> Schedule:
    """(update) -> learning rate, float32.

    Args:
      name: constant, linear, cosine (half a wave), wsd (warm-up, stable, cosine decay), inverse_sqrt, or the name
        that `transformers` has for one of them.
      learning_rate: the peak.
      total_steps: updates of the whole run.
      warmup_steps: updates of the rise; where it is 0, ``ceil(warmup_ratio * total_steps)``.
      warmup_ratio: see ``warmup_steps``.
      decay_ratio: for wsd, the part of all updates that decays at the end.
      min_lr_ratio: the floor of linear, cosine and wsd, as a factor of the peak.

    Raises:
      ConfigError: an unknown name, or a warm-up longer than the run.
    """
    kind = ALIASES.get(name, name)
    if kind not in NAMES:
        raise errors.ConfigError(f"no schedule {name!r}. {errors.did_you_mean(name, [*NAMES, *ALIASES])}")
    warmup = warmup_steps or math.ceil(warmup_ratio * total_steps)
    if warmup > total_steps:
        raise errors.ConfigError(f"warm-up of {warmup} steps is longer than the run of {total_steps}")
    decay = min(math.ceil(decay_ratio * total_steps), total_steps - warmup)
    body = _body(kind, warmup, total_steps, decay, min_lr_ratio)

    def schedule(update: Any) -> jax.Array:
        t = jnp.asarray(update, jnp.float32)
        factor = jnp.where(t < warmup, t / max(1, warmup), body(t))
        return jnp.asarray(learning_rate * factor, jnp.float32)

    return schedule


def _body(kind: str, warmup: int, total: int, decay: int, floor: float) -> Schedule:
    """The factor after warm-up, at float32 update t."""
    length = max(1, total - warmup)

    def linear(t: jax.Array) -> jax.Array:
        return floor + (1 - floor) * jnp.clip((total - t) / length, 0, 1)

    def cosine(t: jax.Array) -> jax.Array:
        return floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((t - warmup) / length, 0, 1)))

    def wsd(t: jax.Array) -> jax.Array:
        part = jnp.clip((t - (total - decay)) / max(1, decay), 0, 1)
        return floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * part))

    def inverse_sqrt(t: jax.Array) -> jax.Array:
        scale = warmup or 10_000
        return jnp.sqrt(scale / (t - warmup + scale))

    bodies: dict[str, Schedule] = {
        "linear": linear,
        "cosine": cosine,
        "wsd": wsd,
        "inverse_sqrt": inverse_sqrt,
        "constant": jnp.ones_like,
    }
    return bodies[kind]
