"""The mean of an objective's loss and metrics over a finite loader."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from tunejax.core.paths import Params
from tunejax.train import sharding, signals
from tunejax.train.state import TrainState
from tunejax.train.step import Steps


def evaluate(step: Steps, state: TrainState, base: Params, batches: Iterable) -> dict[str, float]:
    """Means over all rows of ``batches`` (this process's rows), exact whatever the batch sizes, as the objective's
    ``scores`` gives them.

    A short last batch is filled up with rows of weight 0. Where processes have unequal numbers of batches, those that
    are done join in with such rows until all are.
    """
    totals: dict[str, Any] = {}
    frozen, rows = step.objective.frozen, 0
    last: dict[str, np.ndarray] | None = None
    source = iter(batches)
    while True:
        batch = next(source, None)
        if not signals.any_process(batch is not None):
            break
        if batch is None:
            if last is None:
                raise ValueError("a process has no evaluation rows at all; give at least one row to each")
            batch = {k: x[:0] for k, x in last.items()}
        last = batch
        rows = max(rows, fitting(len(batch["tokens"]), step.mesh))
        sums = step.evaluate(state, base, frozen, step.put(filled(batch, rows)))
        totals = jax.tree.map(np.add, totals, jax.device_get(sums)) if totals else jax.device_get(sums)
    means = {name: total / max(weight, 1e-9) for name, (total, weight) in totals.items()}
    return {name: float(x) for name, x in step.objective.scores(means).items()}


def fitting(rows: int, mesh: Any) -> int:
    """The least number of this process's rows, at least ``rows``, that divides over the mesh."""
    shards = max(1, sharding.batch_shards(mesh) // jax.process_count())
    return max(1, -(-rows // shards)) * shards


def filled(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """``batch`` with empty rows (zeros: padding of weight 0) up to ``rows``."""
    short = rows - len(batch["tokens"])
    if not short:
        return batch
    return {k: np.concatenate([x, np.zeros((short, *x.shape[1:]), x.dtype)]) for k, x in batch.items()}
