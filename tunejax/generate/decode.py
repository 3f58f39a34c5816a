"""Decoding with a cache: the whole of it as one compiled program, or a step at a time to stream.

Prompts of different lengths go in one batch, padded on either side: the model masks by segment and position, so a
row's text does not depend on the rows beside it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors
from tunejax.core.model import Model, full_batch
from tunejax.core.paths import Params
from tunejax.generate import sampling as sampling_

GREEDY = sampling_.Sampling()
BUCKET = 16
"""Prompts are padded to a multiple of so many tokens, so that few lengths are compiled."""


class _Plan(NamedTuple):
    """All that a compiled program depends on besides shapes; hashable."""

    hidden: Callable[..., Any]
    head: Callable[..., Any]
    logits: Callable[..., Any]
    cache: Callable[..., Any]
    max_new_tokens: int
    sampling: sampling_.Sampling
    stop_tokens: tuple[int, ...]
    pad_id: int


class _Carry(NamedTuple):
    """Between two steps: how many tokens were drawn, the last of each row [batch], rows that stopped, the position
    of the last token, and the cache, which holds all tokens but the last."""

    drawn: jax.Array
    token: jax.Array
    done: jax.Array
    position: jax.Array
    cache: Any


def generate(
    model: Model,
    params: Params,
    tokens: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int,
    sampling: sampling_.Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    key: Any = None,
    prompt: Sequence[int] = (),
) -> jax.Array:
    """New tokens of a batch of prompts, by one compiled program that ends when every row has stopped.

    Args:
      model: a decoder with an lm head.
      params: its parameters; kernels may be operators (those that a method binds).
      tokens: int [batch, length].
      attention_mask: [batch, length], 1 for a token, 0 for padding before or after the prompt; none: all ones.
      max_new_tokens: how many at most.
      sampling: greedy unless told.
      stop_tokens: a row ends with the first of these, which is in the result.
      pad_id: what follows it.
      key: a PRNG key, for sampling; a row's draws depend on the key and its place in the batch only.
      prompt: ids before every row's own (the virtual tokens that a method trained).

    Returns:
      int32 [batch, max_new_tokens].

    Raises:
      ConfigError: an empty prompt, a mask of another shape, a model that does not write, or sampling without a key.
    """
    plan = _plan(model, max_new_tokens, sampling, stop_tokens, pad_id, key)
    return _all(plan, params, *_prompts(tokens, attention_mask, prompt), _key(key))


def stream(
    model: Model,
    params: Params,
    tokens: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int,
    sampling: sampling_.Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    key: Any = None,
    prompt: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """The same tokens as `generate`, int32 [batch] a step as they are drawn; it ends when every row has stopped."""
    plan = _plan(model, max_new_tokens, sampling, stop_tokens, pad_id, key)
    prompts, key = _prompts(tokens, attention_mask, prompt), _key(key)
    return _steps(plan, params, prompts, key)


def _steps(plan: _Plan, params: Params, prompts: tuple[np.ndarray, np.ndarray], key: Any) -> Iterator[np.ndarray]:
    carry = _prefill_jit(plan, params, *prompts, key)
    yield np.asarray(carry.token)
    for _ in range(plan.max_new_tokens - 1):
        if bool(jnp.all(carry.done)):
            return
        carry = _step_jit(plan, params, carry, key)
        yield np.asarray(carry.token)


def _prefill(plan: _Plan, params: Params, tokens: jax.Array, mask: jax.Array, key: Any) -> _Carry:
    """The prompts through the model, and the first token."""
    batch = full_batch(tokens, mask)
    rows, length = tokens.shape
    dtype = jax.eval_shape(lambda p: plan.hidden(p, batch)[0], params).dtype
    hidden, aux = plan.hidden(params, batch, cache=plan.cache(rows, length + plan.max_new_tokens - 1, dtype))
    last = jnp.max(jnp.arange(length) * (mask > 0), axis=1)[:, None]
    carry = _Carry(
        drawn=jnp.zeros((), jnp.int32),
        token=jnp.full((rows,), plan.pad_id, jnp.int32),
        done=jnp.zeros((rows,), bool),
        position=jnp.take_along_axis(batch["positions"], last, axis=1)[:, 0],
        cache=aux["cache"],
    )
    return _drawn(plan, params, carry, jnp.take_along_axis(hidden, last[..., None], axis=1), key)


def _step(plan: _Plan, params: Params, carry: _Carry, key: Any) -> _Carry:
    """The last tokens through the model, and the next."""
    ones = jnp.ones_like(carry.token)
    batch = {"tokens": carry.token, "positions": carry.position, "segment_ids": ones}
    hidden, aux = plan.hidden(params, {k: v[:, None] for k, v in batch.items()}, cache=carry.cache)
    return _drawn(plan, params, carry._replace(cache=aux["cache"]), hidden, key)


def _drawn(plan: _Plan, params: Params, carry: _Carry, hidden: jax.Array, key: Any) -> _Carry:
    """``carry`` with the token drawn from hidden [batch, 1, embed]."""
    logits = plan.logits(plan.head(params), hidden)[:, 0]
    step_key = jax.random.fold_in(key, carry.drawn)
    keys = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(jnp.arange(hidden.shape[0]))
    token = jnp.where(carry.done, plan.pad_id, sampling_.draw(logits, plan.sampling, keys))
    stops = jnp.isin(token, jnp.asarray(plan.stop_tokens, jnp.int32)) if plan.stop_tokens else False
    return _Carry(carry.drawn + 1, token, carry.done | stops, carry.position + 1, carry.cache)


@functools.partial(jax.jit, static_argnums=0)
def _all(plan: _Plan, params: Params, tokens: jax.Array, mask: jax.Array, key: Any) -> jax.Array:
    def body(at: tuple[_Carry, jax.Array]) -> tuple[_Carry, jax.Array]:
        carry = _step(plan, params, at[0], key)
        return carry, jax.lax.dynamic_update_slice(at[1], carry.token[:, None], (0, carry.drawn - 1))

    def unfinished(at: tuple[_Carry, jax.Array]) -> jax.Array:
        return (at[0].drawn < plan.max_new_tokens) & ~jnp.all(at[0].done)

    first = _prefill(plan, params, tokens, mask, key)
    out = jnp.full((tokens.shape[0], plan.max_new_tokens), plan.pad_id, jnp.int32).at[:, 0].set(first.token)
    return jax.lax.while_loop(unfinished, body, (first, out))[1]


_prefill_jit = jax.jit(_prefill, static_argnums=0)
_step_jit = jax.jit(_step, static_argnums=0, donate_argnums=2)


def _plan(
    model: Model,
    max_new_tokens: int,
    sampling: sampling_.Sampling,
    stop_tokens: Sequence[int],
    pad_id: int,
    key: Any,
) -> _Plan:
    sampling_.check(sampling)
    if model.cache is None:
        raise errors.ConfigError("an encoder does not generate text: build a decoder with head='lm'")
    if max_new_tokens < 1:
        raise errors.ConfigError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if sampling.temperature > 0 and key is None:
        raise errors.ConfigError(f"sampling at temperature {sampling.temperature} needs a key: jax.random.key(seed)")
    stops = tuple(int(s) for s in stop_tokens)
    return _Plan(model.hidden, model.head, model.logits, model.cache, int(max_new_tokens), sampling, stops, int(pad_id))


def _key(key: Any) -> Any:
    return jax.random.key(0) if key is None else key


def _prompts(tokens: Any, attention_mask: Any, prompt: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and mask [batch, length] with ``prompt`` in each row, padded in front to a multiple of `BUCKET`."""
    tokens = np.asarray(tokens, np.int32)
    mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask, np.int32)
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise errors.ConfigError(
            f"prompts of shape {tokens.shape} with a mask of shape {mask.shape}; expected both [batch, length]"
        )
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise errors.ConfigError(f"prompt {int(empty[0])} is empty: it needs one token at least, such as <s>")
    # Before a row's padding, which is masked: positions count what is real, so they go on from the prompt.
    first = np.broadcast_to(np.asarray(prompt, np.int32), (len(tokens), len(prompt)))
    tokens, mask = np.concatenate([first, tokens], 1), np.concatenate([np.ones_like(first), mask], 1)
    front = ((0, 0), (-tokens.shape[1] % BUCKET, 0))
    return np.pad(tokens, front), np.pad(mask, front)
