"""On-policy batches: the student writes the completions that it then learns from (GKD, arXiv:2306.13649, algorithm 1).

What a step draws depends on the seed, its number and the state alone, so a resumed run draws the same.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tunejax.core.method import Context
from tunejax.core.paths import Params
from tunejax.data import collate, completions
from tunejax.generate import decode, sampling
from tunejax.train.state import TrainState
from tunejax.train.step import Metrics, Step, Sums


class Options(NamedTuple):
    """How a student writes.

    fraction: of the steps, in which it does; in the others the rows' own completions are learned from.
    max_new_tokens, sampling, stop_tokens: see `decode.generate`. virtual: ids that every row begins with.
    buckets: lengths that its rows are padded to; the last is the longest that a row may have.
    """

    fraction: float
    max_new_tokens: int
    sampling: sampling.Sampling
    stop_tokens: tuple[int, ...]
    buckets: tuple[int, ...]
    pad_id: int = 0
    virtual: tuple[int, ...] = ()
    seed: int = 0


class OnPolicy:
    """A `Step` whose batches, of one example a row on this host, get completions of the student's in their turn."""

    def __init__(self, step: Step, options: Options) -> None:
        self.step, self.options = step, options
        self.objective, self.mesh = step.objective, step.mesh
        self._ran: Any = None

    def __call__(
        self, state: TrainState, base: Params, frozen: Params, batch: Mapping[str, np.ndarray]
    ) -> tuple[TrainState, Metrics]:
        at = int(state.step)
        if np.random.default_rng((self.options.seed, at)).random() < self.options.fraction:
            batch = self.written(state, base, batch, at)
        self._ran = self.step.put(batch)
        return self.step(state, base, frozen, self._ran)

    def put(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The batch as it is: it goes to the devices once it is complete."""
        return batch

    def evaluate(self, state: TrainState, base: Params, frozen: Params, batch: Mapping[str, np.ndarray]) -> Sums:
        """As of the step."""
        return self.step.evaluate(state, base, frozen, self.step.put(batch))

    def memory(self, state: TrainState, base: Params, frozen: Params, batch: Any) -> int | None:
        """As of the step, with the batch that it was last given: the rows' own would be compiled for this alone."""
        return self.step.memory(state, base, frozen, self._ran)

    def written(self, state: TrainState, base: Params, batch: Mapping[str, np.ndarray], at: int) -> dict[str, Any]:
        """The prompts of ``batch`` with what the student says to them at step ``at``."""
        o = self.options
        asked = completions.prompts(batch, len(o.virtual))
        longest = max(map(len, asked))
        # An empty row is asked something too, which `completed` throws away.
        new = decode.generate(
            self.step.model,
            self.step.method.bind(base, state.train, state.state, Context()),
            *completions.left_padded([p or [o.pad_id] for p in asked], longest or 1),
            max_new_tokens=o.max_new_tokens,
            sampling=o.sampling,
            stop_tokens=o.stop_tokens,
            key=jax.random.fold_in(jax.random.key(o.seed), at),
            prompt=o.virtual,
        )
        needed = min(len(o.virtual) + longest + o.max_new_tokens - 1, o.buckets[-1])
        return completions.completed(
            asked,
            np.asarray(new),
            collate.bucket(needed, o.buckets),
            stop_tokens=o.stop_tokens,
            pad_id=o.pad_id,
            virtual=o.virtual,
        )
