"""Masked language modelling (BERT, arXiv:1810.04805): predict the tokens that were hidden."""

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
        this id, 10% a random one, 10% stay. Evaluation hides the same ones each time. None: the batch comes hidden,
        and its targets and loss_weights say where.
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
                         special_token_ids)  # fmt: skip
        hidden, _ = model.hidden(params, batch, key=ctx.key if ctx.train else None)
        return causal_lm.vocabulary_loss(model, params, hidden, batch, ctx, label_smoothing, 0.0, chunk_size)

    return Objective("masked_lm", {}, loss)


def hide(
    key: jax.Array, batch: Batch, mask_token_id: int, vocab_size: int, probability: float, special: tuple[int, ...] = ()
) -> dict[str, jax.Array]:
    """``batch`` with tokens hidden, the true ones as targets, and loss_weights 1 where one is hidden.

    Padding (segment 0), ``special`` ids and virtual tokens (ids from vocab_size on) are left alone.
    """
    tokens = batch["tokens"]
    choose, how, what = jax.random.split(key, 3)
    allowed = (batch["segment_ids"] > 0) & (tokens < vocab_size)
    for token in special:
        allowed &= tokens != token
    hidden = allowed & (jax.random.uniform(choose, tokens.shape) < probability)
    die = jax.random.uniform(how, tokens.shape)
    other = jax.random.randint(what, tokens.shape, 0, vocab_size, tokens.dtype)
    shown = jnp.where(die < 0.8, jnp.asarray(mask_token_id, tokens.dtype), jnp.where(die < 0.9, other, tokens))
    return {
        **batch,
        "tokens": jnp.where(hidden, shown, tokens),
        "targets": jnp.where(tokens < vocab_size, tokens, 0),
        "loss_weights": hidden.astype(jnp.float32),
    }
