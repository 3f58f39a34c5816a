"""The plan of all batches: which examples stand in which row of which global batch. No tokens are touched."""

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tunejax.data import order, packing
from tunejax.data.corpus import Corpus
from tunejax.data.packing import Bin

GROUPED = 50
"""Batches whose examples are sorted by length together, with group_by_length."""


class Settings(NamedTuple):
    """What the global batches depend on; see `pipeline.make_loader`."""

    batch_size: int
    max_length: int
    packing: str | None
    seed: int
    shuffle: bool
    group_by_length: bool
    drop_last: bool
    buckets: tuple[int, ...]
    prompt: tuple[int, ...] = ()

    def size(self, pieces: Bin) -> int:
        """Positions of a row that these pieces fill, each with its prompt."""
        return sum(p.stop - p.start + len(self.prompt) for p in pieces)


class Plan:
    """The global batches of each epoch, made when asked for and kept for the last few epochs."""

    def __init__(self, corpus: Corpus, settings: Settings):
        self.corpus, self.settings = corpus, settings
        self._steady = not settings.packing and all(weight == 1 for _, weight in corpus.parts)
        self._counts: list[int] = []
        self._kept: dict[int, Sequence[packing.Bin]] = {}
        self._lock = threading.RLock()

    def rows(self, epoch: int) -> Sequence[packing.Bin]:
        """All rows of an epoch in order; batch i holds those from ``i * batch_size``."""
        with self._lock:
            if epoch not in self._kept:
                self._kept = {e: r for e, r in self._kept.items() if abs(e - epoch) <= 1}
                self._kept[epoch] = self._make(epoch)
            return self._kept[epoch]

    def _make(self, epoch: int) -> Sequence[packing.Bin]:
        s, lengths = self.settings, self.corpus.store.lengths
        indices = order.epoch_order(self.corpus.parts, s.seed, epoch, s.shuffle)
        if s.packing:
            return packing.pack(indices, lengths, s.max_length, strategy=s.packing, extra=len(s.prompt))
        if s.group_by_length:
            indices = _grouped(indices, lengths, s, epoch)
        return [(packing.Piece(i, 0, int(lengths[i])),) for i in indices.tolist()]

    def batches(self, epoch: int) -> int:
        """How many batches an epoch has. With packing or weights epochs differ a little."""
        epoch = 0 if self._steady else epoch
        with self._lock:
            while len(self._counts) <= epoch:
                rows, size = len(self.rows(len(self._counts))), self.settings.batch_size
                self._counts.append(rows // size if self.settings.drop_last else math.ceil(rows / size))
            return self._counts[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, batch in it) of a global batch."""
        if self._steady:
            return divmod(step, self.batches(0))
        epoch = 0
        while step >= self.batches(epoch):
            step -= self.batches(epoch)
            epoch += 1
        return epoch, step

    def steps(self, epochs: float) -> int:
        """Batches of so many epochs, the last of which may be a part."""
        whole = int(epochs)
        rest = epochs - whole
        return sum(self.batches(e) for e in range(whole)) + (math.ceil(rest * self.batches(whole)) if rest else 0)

    def batch(self, step: int) -> tuple[int, Sequence[packing.Bin]]:
        """(epoch, the rows of all hosts) of a global batch; the last of an epoch may have fewer than batch_size."""
        epoch, at = self.locate(step)
        size = self.settings.batch_size
        return epoch, self.rows(epoch)[at * size : (at + 1) * size]


def _grouped(indices: np.ndarray, lengths: np.ndarray, s: Settings, epoch: int) -> np.ndarray:
    """Sorted by length within windows of batches; the batches of a window shuffled, the short last one last."""
    out = []
    size = s.batch_size * GROUPED
    for at in range(0, len(indices), size):
        window = indices[at : at + size]
        window = window[np.argsort(-lengths[window], kind="stable")]
        full = len(window) // s.batch_size
        chosen = order.permutation(full, s.seed, 3, epoch, at) if s.shuffle else np.arange(full)
        out += [window[b * s.batch_size : (b + 1) * s.batch_size] for b in chosen] + [window[full * s.batch_size :]]
    return np.concatenate(out)
