"""Classification of whole examples, one labelled position a row."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core.method import Context
from tunejax.core.model import Batch, Model
from tunejax.core.objective import LossOutput, Objective
from tunejax.core.paths import Params
from tunejax.objectives import causal_lm


def make(*, label_smoothing: float = 0.0, class_weights: tuple[float, ...] | None = None) -> Objective:
    """Cross-entropy over labels.

    A row's label is its target at the position of its greatest loss_weight (the first token of an encoder, the last
    of a decoder), and that is the position whose hidden state is classified. A row without weights does not count.

    Args:
      label_smoothing: e of (1 - e) one_hot + e / labels.
      class_weights: a factor on the loss_weight of each label's rows, so the mean is weighted, as in torch; with
        label_smoothing, what a row's loss has of each label is weighted by that label, as there.

    Metrics: accuracy (unweighted by class); in evaluation also matthews, as of `matthews`.
    """
    return objective("classification", label_smoothing, class_weights)


def objective(
    name: str, label_smoothing: float, class_weights: tuple[float, ...] | None, columns: tuple[int, ...] | None = None
) -> Objective:
    """As `make`. columns: the labels' logits among the head's, in order; None: all."""
    causal_lm.check_options(label_smoothing)

    def loss(model: Model, params: Params, frozen: Params, batch: Batch, ctx: Context) -> LossOutput:
        hidden, _ = model.hidden(params, batch, key=ctx.key if ctx.train else None)
        x, labels, rows = labelled(model, params, hidden, batch, columns)
        weights = rows if class_weights is None else rows * _of_classes(class_weights, labels)
        logp = jax.nn.log_softmax(x, axis=-1)
        if class_weights is not None:
            logp *= jnp.asarray(class_weights, jnp.float32)
        losses = -(1 - label_smoothing) * jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0]
        losses -= label_smoothing * jnp.mean(logp, axis=-1)
        correct = (jnp.argmax(x, axis=-1) == labels).astype(jnp.float32)
        metrics: dict[str, Any] = {"accuracy": (jnp.sum(rows * correct), jnp.sum(rows))}
        if not ctx.train:
            true, said = (jax.nn.one_hot(k, x.shape[-1]) for k in (labels, jnp.argmax(x, axis=-1)))
            metrics["confusion"] = (jnp.einsum("r,rt,rs->ts", rows, true, said), jnp.sum(rows))
        return jnp.sum(rows * losses), jnp.sum(weights), metrics

    def weights(batch: Batch) -> jax.Array:
        return batch["loss_weights"] * _of_classes(class_weights or (), batch["targets"])

    return Objective(name, {}, loss, scores, weights if class_weights else None)


def _of_classes(class_weights: tuple[float, ...], labels: jax.Array) -> jax.Array:
    return jnp.asarray(class_weights, jnp.float32)[labels]


def scores(means: dict[str, Any]) -> dict[str, Any]:
    """``means`` with matthews instead of the confusion matrix."""
    return {**{k: v for k, v in means.items() if k != "confusion"}, "matthews": matthews(means["confusion"])}


def matthews(confusion: Any) -> float:
    """Matthews' correlation of labels and predictions, from -1 to 1; 0 where either is always the same.

    Of several classes it is Gorodkin's R_K (2004, doi:10.1016/j.compbiolchem.2004.09.006, equation 8).

    Args:
      confusion: [labels, predictions], counts or shares.
    """
    c = np.asarray(confusion, np.float64)
    c = c / max(c.sum(), 1e-9)
    true, said = c.sum(1), c.sum(0)
    spread = (1 - np.sum(true**2)) * (1 - np.sum(said**2))
    return float((np.trace(c) - true @ said) / np.sqrt(spread)) if spread > 1e-12 else 0.0


def labelled(
    model: Model, params: Params, hidden: jax.Array, batch: Batch, columns: tuple[int, ...] | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Float32 logits [batch, labels], labels [batch] and row weights [batch] at each row's labelled position."""
    all_weights = batch["loss_weights"].astype(jnp.float32)
    at = jnp.argmax(all_weights, axis=1)[:, None]
    rows = jnp.take_along_axis(all_weights, at, axis=1)[:, 0]
    labels = jnp.take_along_axis(batch["targets"], at, axis=1)[:, 0]
    pooled = jnp.take_along_axis(hidden, at[..., None], axis=1)[:, 0]
    x = model.logits(model.head(params), pooled).astype(jnp.float32)
    x = x if columns is None else x[:, np.asarray(columns)]
    # A row that does not count may have any target; one that does and has no such class gives NaN.
    return x, jnp.where(rows > 0, labels, 0), rows
