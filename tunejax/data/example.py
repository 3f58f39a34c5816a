"""An example: the tokens of one row with what each position predicts and how much that counts."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """One row ready for a model; all arrays are [n].

    tokens: int32 inputs.
    targets: int32, already shifted: ``targets[i]`` is what position i predicts (a label in classification).
    loss_weights: float32, 0 where nothing is learned.
    source: "file:line" of the row.
    token_types: int32 or None; 1 in the second text of a pair.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    source: str
    token_types: np.ndarray | None = None


def shifted(ids: list[int], in_loss: list[bool], source: str, virtual: tuple[int, ...] = ()) -> Example:
    """The next-token example of a sequence of m ids: n = m - 1 positions, the last id is only ever a target.

    in_loss: [m], whether predicting that id counts; the first id is predicted by nothing. virtual: ids that are no
    targets, which are 0 in their place.
    """
    sequence = np.asarray(ids, np.int32)
    targets, weights = sequence[1:], np.asarray(in_loss[1:], np.float32)
    if virtual:
        soft = np.isin(targets, virtual)
        targets, weights = np.where(soft, 0, targets), np.where(soft, np.float32(0), weights)
    return Example(sequence[:-1], targets, weights, source)


class Store:
    """Examples in flat arrays, so that a million of them are a few arrays. Immutable; indexing gives an `Example`."""

    def __init__(self, examples: Iterable[Example]):
        rows = list(examples)
        self.lengths = np.asarray([len(r.tokens) for r in rows], np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])
        self.sources = [r.source for r in rows]
        self.tokens = _flat([r.tokens for r in rows], np.int32)
        self.targets = _flat([r.targets for r in rows], np.int32)
        self.loss_weights = _flat([r.loss_weights for r in rows], np.float32)
        self.token_types = None
        if any(r.token_types is not None for r in rows):
            self.token_types = _flat(
                [np.zeros_like(r.tokens) if r.token_types is None else r.token_types for r in rows], np.int32
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self.starts[index], self.starts[index + 1])
        types = None if self.token_types is None else self.token_types[part]
        return Example(self.tokens[part], self.targets[part], self.loss_weights[part], self.sources[index], types)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of all that a batch can hold; a resumed run compares it."""
        h = hashlib.blake2b(digest_size=8)
        for a in (self.lengths, self.tokens, self.targets, self.loss_weights, self.token_types):
            if a is not None:
                h.update(np.ascontiguousarray(a).data)
        return h.hexdigest()


def _flat(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
