"""Cross-entropy of rows of logits, with its gradient in one elementwise pass."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core.paths import Params
from tunejax.objectives import chunked
from tunejax.objectives.chunked import Given, Loss, Metrics


class Output(NamedTuple):
    """Float32 scalars. loss: the weighted sum. correct: the weights of positions whose target has the highest logit.

    nll: the weighted sum of plain cross-entropies, without smoothing and z_loss. It and correct are 0 unless asked for.
    """

    loss: jax.Array
    correct: jax.Array
    nll: jax.Array


def over_positions(
    logits: Callable[[Params, jax.Array], jax.Array],
    head: Params,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    measured: bool = False,
) -> Output:
    """Weighted sum of cross-entropies, softmax in float32, in chunks: see `chunked.weighted_sum`.

    Args:
      logits, head, hidden, weights, vocab_size, chunk_size: as there.
      targets: [batch, length] int32. Where the weight is 0 any value will do (-100 too).
      label_smoothing: e of (1 - e) one_hot + e / vocab, as in `torch.nn.functional.cross_entropy`.
      z_loss: adds z * logsumexp(logits)^2 a position (PaLM, arXiv:2204.02311, section 5).
      measured: also sum what training does not need, correct and nll; costs one more pass over the logits.
    """
    given = Given(jnp.clip(targets, 0, vocab_size - 1))
    total, metrics = chunked.weighted_sum(
        loss(label_smoothing, z_loss, measured), logits, head, hidden, given, weights, vocab_size=vocab_size,
        chunk_size=chunk_size,
    )  # fmt: skip
    return Output(total, *(metrics.get(name, jnp.zeros((), jnp.float32)) for name in ("correct", "nll")))


@functools.cache
def loss(label_smoothing: float = 0.0, z_loss: float = 0.0, measured: bool = False) -> Loss:
    """The loss of one row; its ``given.rows`` are the targets [rows]. measured: as in `over_positions`."""

    def value(x: jax.Array, given: Given) -> tuple[jax.Array, jax.Array, Metrics]:
        targets = given.rows
        lse = jax.nn.logsumexp(x, axis=-1)
        hit = jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]
        losses = lse - (1 - label_smoothing) * hit
        if label_smoothing:
            losses -= label_smoothing * jnp.mean(x, axis=-1)
        if z_loss:
            losses += z_loss * jnp.square(lse)
        if not measured:
            return losses, lse, {}
        return losses, lse, {"correct": (jnp.argmax(x, axis=-1) == targets).astype(jnp.float32), "nll": lse - hit}

    def slope(x: jax.Array, lse: jax.Array, given: Given, weights: jax.Array) -> jax.Array:
        vocab = x.shape[-1]
        grown = weights * (1 + 2 * z_loss * lse) if z_loss else weights
        out = jnp.exp(x - lse[..., None]) * grown[..., None]
        at_target = jnp.arange(vocab, dtype=given.rows.dtype) == given.rows[..., None]
        out -= jnp.where(at_target, (1 - label_smoothing) * weights[..., None], 0)
        return out - label_smoothing / vocab * weights[..., None] if label_smoothing else out

    return Loss(value, slope)
