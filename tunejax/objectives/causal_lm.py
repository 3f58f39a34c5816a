"""Next-token prediction: the loss of a language model on the positions that ``loss_weights`` marks."""

import jax

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.core.model import Batch, Model
from tunejax.core.objective import LossOutput, Objective
from tunejax.core.paths import Params
from tunejax.objectives import cross_entropy


def make(*, label_smoothing: float = 0.0, z_loss: float = 0.0, chunk_size: int | None = None) -> Objective:
    """Cross-entropy of ``targets`` (already shifted), weighted by ``loss_weights``, both [batch, length].

    Args:
      label_smoothing: in [0, 1); see `cross_entropy.over_positions`, as are the next two.
      z_loss: weight of the squared log-partition.
      chunk_size: positions a chunk of logits; by default chosen by memory.

    Metrics: accuracy over the weighted positions, in evaluation only (it costs a pass over the logits); there also nll,
    the cross-entropy alone, where the loss is more than that.
    """
    check_options(label_smoothing, z_loss, chunk_size)

    def loss(model: Model, params: Params, frozen: Params, batch: Batch, ctx: Context) -> LossOutput:
        hidden, _ = model.hidden(params, batch, key=ctx.key if ctx.train else None)
        return vocabulary_loss(model, params, hidden, batch, ctx, label_smoothing, z_loss, chunk_size)

    return Objective("causal_lm", {}, loss)


def vocabulary_loss(
    model: Model,
    params: Params,
    hidden: jax.Array,
    batch: Batch,
    ctx: Context,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> LossOutput:
    """The chunked loss of ``hidden`` [batch, length, embed] on the targets and loss_weights of ``batch``.

    Metrics as of `make`.
    """
    weights = batch["loss_weights"]
    out = cross_entropy.over_positions(
        model.logits,
        model.head(params),
        hidden,
        batch["targets"],
        weights,
        vocab_size=model.vocab_size,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_size=chunk_size,
        measured=not ctx.train,
    )
    metrics = {} if ctx.train else {"accuracy": out.correct}
    if metrics and (label_smoothing or z_loss):
        metrics["nll"] = out.nll
    return out.loss, weights.astype("float32").sum(), metrics


def check_options(label_smoothing: float, z_loss: float = 0.0, chunk_size: int | None = None) -> None:
    """Raises ConfigError naming the option that is out of range."""
    if not 0 <= label_smoothing < 1:
        raise errors.ConfigError(f"label_smoothing is {label_smoothing}; expected 0 <= label_smoothing < 1")
    if z_loss < 0:
        raise errors.ConfigError(f"z_loss is {z_loss}; expected 0 or more (1e-4 is usual)")
    if chunk_size is not None and chunk_size < 1:
        raise errors.ConfigError(f"chunk_size is {chunk_size}; expected 1 or more positions, or none to choose it")
