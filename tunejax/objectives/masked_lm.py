"""Masked language modelling (BERT, arXiv:1810.04805): predict the tokens that were hidden."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.core.model import Batch, Model
from tunejax.core.objective import LossOutput, Objective
from tunejax.core.paths import Params
from tunejax.objectives import causal_lm


def make(
    *,
    mask_token_id: int | None = None,
    mlm_probability: float = 0.15,
    special_token_ids: tuple[int, ...] = (),
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Objective:
    """Cross-entropy on hidden tokens.

    Args:
      mask_token_id: hide tokens anew each step, on the device: each with ``mlm_probability``, of these 80% become
        this id, 10% a random one, 10% stay. Evaluation hides the same ones of a text each time, whatever batch it is
        in. None: the batch comes hidden, and its targets and loss_weights say where.
      mlm_probability: how likely a token is hidden.
      special_token_ids: ids never hidden ([CLS], [SEP], [PAD]).
      label_smoothing, chunk_size: as in `causal_lm.make`.

    Raises:
      ConfigError: an option out of range.
    """
    causal_lm.check_options(label_smoothing, 0.0, chunk_size)
    if not 0 < mlm_probability < 1:
        raise errors.ConfigError(f"mlm_probability is {mlm_probability}; expected a number between 0 and 1")

    def loss(model: Model, params: Params, frozen: Params, batch: Batch, ctx: Context) -> LossOutput:
        if mask_token_id is not None:
            key = ctx.key if ctx.train and ctx.key is not None else jax.random.key(0)
            batch = hide(jax.random.fold_in(key, 1), batch, mask_token_id, model.vocab_size, mlm_probability,
                         special_token_ids, by_content=not ctx.train)  # fmt: skip
        hidden, _ = model.hidden(params, batch, key=ctx.key if ctx.train else None)
        return causal_lm.vocabulary_loss(model, params, hidden, batch, ctx, label_smoothing, 0.0, chunk_size)

    return Objective("masked_lm", {}, loss)


class Draws(NamedTuple):
    """Chances of every position [batch, length]: choose and how in [0, 1), other an id of the vocabulary."""

    choose: jax.Array
    how: jax.Array
    other: jax.Array

    @classmethod
    def of(cls, key: jax.Array, shape: tuple[int, ...], vocab_size: int, dtype: Any) -> "Draws":
        """All of one shape from one key."""
        choose, how, what = jax.random.split(key, 3)
        other = jax.random.randint(what, shape, 0, vocab_size, dtype)
        return cls(jax.random.uniform(choose, shape), jax.random.uniform(how, shape), other)


def hide(
    key: jax.Array,
    batch: Batch,
    mask_token_id: int,
    vocab_size: int,
    probability: float,
    special: tuple[int, ...] = (),
    *,
    by_content: bool = False,
) -> dict[str, jax.Array]:
    """``batch`` with tokens hidden, the true ones as targets, and loss_weights 1 where one is hidden.

    Padding (segment 0), ``special`` ids and virtual tokens (ids from vocab_size on) are left alone.

    by_content: what is hidden of an example depends on its own tokens alone, not on the batch: an evaluation is the
    same however its rows are batched, padded, packed and spread over devices. Equal examples are then hidden alike.
    """
    tokens = batch["tokens"]
    allowed = real = (batch["segment_ids"] > 0) & (tokens < vocab_size)
    for token in special:
        allowed &= tokens != token
    if by_content:
        draws = _by_content(key, tokens, batch["segment_ids"], real, vocab_size)
    else:
        draws = Draws.of(key, tokens.shape, vocab_size, tokens.dtype)
    hidden = allowed & (draws.choose < probability)
    die, other = draws.how, draws.other
    shown = jnp.where(die < 0.8, jnp.asarray(mask_token_id, tokens.dtype), jnp.where(die < 0.9, other, tokens))
    return {
        **batch,
        "tokens": jnp.where(hidden, shown, tokens),
        "targets": jnp.where(tokens < vocab_size, tokens, 0),
        "loss_weights": hidden.astype(jnp.float32),
    }


def _by_content(key: jax.Array, tokens: jax.Array, segments: jax.Array, real: jax.Array, vocab_size: int) -> Draws:
    """Draws of each position by a key of its own: of the tokens of its example, and how many come before it there."""

    def per_example(reduce: Any, x: jax.Array) -> jax.Array:
        one = lambda x, s: reduce(x, s, num_segments=tokens.shape[1] + 1)[s]  # noqa: E731
        return jax.vmap(one)(x, segments)

    before = jnp.cumsum(real, axis=1) - real
    place = before - per_example(jax.ops.segment_min, before)
    mixed = _mixed(_mixed(tokens.astype(jnp.uint32)) + place.astype(jnp.uint32))
    content = per_example(jax.ops.segment_sum, jnp.where(real, mixed, 0))
    keys = jax.vmap(lambda c, i: jax.random.fold_in(jax.random.fold_in(key, c), i))(content.ravel(), place.ravel())
    draws = jax.vmap(lambda k: Draws.of(k, (), vocab_size, tokens.dtype))(keys)
    return Draws(*(x.reshape(tokens.shape) for x in draws))


def _mixed(x: jax.Array) -> jax.Array:
    """uint32 whose every bit depends on all of x: the finaliser of MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
