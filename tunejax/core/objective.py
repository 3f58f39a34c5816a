"""Objectives: losses as sums and weights, so that accumulation, packing and data parallelism are exact."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from tunejax.core.method import Context
from tunejax.core.model import Batch, Model
from tunejax.core.paths import Params

LossOutput = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


class Objective(NamedTuple):
    """What training minimises: ``loss_sum / weight_sum`` over however many batches.

    frozen: a teacher's or reference's parameters: sharded, never donated, never a constant of the program.
    loss:   (model, params, frozen, batch, ctx) -> (loss_sum, weight_sum, metrics); metrics are sums too, each to be
            divided by weight_sum, unless it is a pair (sum, weight) of its own. Scalars while ctx.train; in evaluation
            a sum may be an array, of which ``scores`` makes numbers.
    scores: (means over all rows of an evaluation, by name) -> scores by name, for what is no mean over rows (a
            correlation, an F1).
    weights: batch -> float32 [batch, length], how much each position counts in weight_sum; None: its loss_weights.
    """

    name: str
    frozen: Params
    loss: Callable[[Model, Params, Params, Batch, Context], LossOutput]
    scores: Callable[[dict[str, Any]], dict[str, Any]] = dict
    weights: Callable[[Batch], jax.Array] | None = None


def mean(total: Any, weight: Any) -> Any:
    """total / weight, and 0 where nothing was weighted."""
    return total / jax.numpy.maximum(weight, 1e-9)
