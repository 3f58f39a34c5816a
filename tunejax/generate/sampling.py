"""From logits to the next token: greedy, or temperature, top-k, top-p and min-p, in that order as in transformers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import errors

REMOVED = -jnp.inf
"""The logit of a token that a filter took away."""


class Sampling(NamedTuple):
    """How a token is drawn. Hashable: a compiled program is made for each.

    temperature: logits are divided by it; 0 is greedy, and the filters then do nothing.
    top_k: only the k likeliest tokens (ties with the k-th stay).
    top_p: the smallest set of likeliest tokens whose probabilities reach top_p.
    min_p: only tokens at least min_p times as likely as the likeliest.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


def check(sampling: Sampling) -> None:
    """Raises ConfigError naming the value that is out of range."""
    s = sampling
    if s.temperature < 0:
        raise errors.ConfigError(f"temperature is {s.temperature}; expected 0 (greedy) or more")
    if s.top_k is not None and s.top_k < 1:
        raise errors.ConfigError(f"top_k is {s.top_k}; expected 1 or more, or none")
    for name, value in (("top_p", s.top_p), ("min_p", s.min_p)):
        if value is not None and not 0 < value <= 1:
            raise errors.ConfigError(f"{name} is {value}; expected more than 0 and at most 1, or none")


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """logits [..., vocab] with all but the k greatest removed."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < least, REMOVED, logits)


def top_p(logits: jax.Array, p: float) -> jax.Array:
    """logits [..., vocab] with the least likely removed, as many as have at most 1 - p together; one always stays."""
    order = jnp.argsort(logits, axis=-1)
    rising = jnp.take_along_axis(logits, order, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1)
    dropped = (below <= 1 - p).at[..., -1].set(False)
    back = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(dropped, back, axis=-1), REMOVED, logits)


def min_p(logits: jax.Array, p: float) -> jax.Array:
    """logits [..., vocab] with the tokens removed that are less than p times as likely as the likeliest."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.where(probabilities < p * jnp.max(probabilities, axis=-1, keepdims=True), REMOVED, logits)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 logits [..., vocab] of the distribution that is drawn from (temperature above 0)."""
    x = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        x = top_k(x, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        x = top_p(x, sampling.top_p)
    if sampling.min_p is not None:
        x = min_p(x, sampling.min_p)
    return x


def draw(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """One token a row: logits [batch, vocab], keys [batch] -> int32 [batch]. Greedy takes the first of equals."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling)).astype(jnp.int32)
