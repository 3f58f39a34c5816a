"""Examples to the arrays of a batch, in few static shapes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tunejax.core import errors
from tunejax.data.example import Example, Store
from tunejax.data.packing import Bin


class Beside(Protocol):
    """Further arrays of an example, by name: (index) -> each [n, ...] for its n positions.

    shapes: the shape and type of one position. rows: of arrays that belong to a whole row, of one example: how long the
    row is, and its type. digest: of all the values.
    """

    shapes: Mapping[str, tuple[tuple[int, ...], Any]]
    rows: Mapping[str, tuple[int, Any]]
    digest: str

    def __call__(self, index: int) -> Mapping[str, np.ndarray]:
        """The arrays of one example."""
        ...

    def row(self, index: int) -> Mapping[str, np.ndarray]:
        """Those of ``rows`` of one example, each as long or shorter."""
        ...


def default_buckets(max_length: int, multiple: int | None = None) -> tuple[int, ...]:
    """Lengths that batches are padded to: those of ``multiple`` below ``max_length``, and ``max_length``.

    By default 32, 64, 128, ...: few shapes, since each is a program to compile.
    """
    if multiple is not None:
        return (*range(multiple, max_length, multiple), max_length)
    out, size = [], 32
    while size < max_length:
        out.append(size)
        size *= 2
    return (*out, max_length)


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``length``. Raises DataError if none does."""
    for size in buckets:
        if size >= length:
            return size
    raise errors.DataError(f"an example of {length} tokens is longer than the largest padding bucket {max(buckets)}")


def collate(
    store: Store,
    rows: Sequence[Bin],
    count: int,
    length: int,
    *,
    pad_id: int = 0,
    example: Callable[[int], Example] | None = None,
    prompt: Sequence[int] = (),
    labelled: bool = False,
    beside: Beside | None = None,
) -> dict[str, np.ndarray]:
    """A batch, all [count, length]: tokens, targets, positions, segment_ids int32, loss_weights float32.

    Args:
      rows: the pieces of each row, one after the other: segments 1, 2, ..., whose positions restart at 0. Missing
        rows up to ``count`` are padding.
      length: positions a row; the rest is padding: ``pad_id``, segment 0, weight 0.
      example: index -> the example as it is shown this time (masked), instead of the store's.
      prompt: ids before each piece, whose positions count from the first of them; their targets are 0, their weights
        0 and their token_types 0.
      beside: what else goes where an example's tokens go, [count, length, ...] each; 0 elsewhere. Its ``rows`` are
        those of a row's first example.
      labelled: an example's first position carries its label (and what is beside): the prompt's first then does.

    token_types int32 is there where the store has them.
    """
    batch = {k: np.zeros((count, length), np.int32) for k in ("targets", "positions", "segment_ids")}
    batch["tokens"] = np.full((count, length), pad_id, np.int32)
    batch["loss_weights"] = np.zeros((count, length), np.float32)
    if store.token_types is not None:
        batch["token_types"] = np.zeros((count, length), np.int32)
    more = {} if beside is None else beside.shapes
    for name, (shape, dtype) in more.items():
        batch[name] = np.zeros((count, length, *shape), dtype)
    if beside is not None and beside.rows:
        batch.update(_whole_rows(rows, count, beside))
    for r, pieces in enumerate(rows):
        at = 0
        for segment, (index, start, stop) in enumerate(pieces, 1):
            shown = (example or store.__getitem__)(index)
            begin, size = at + len(prompt), len(prompt) + stop - start
            here = (r, slice(begin, at + size))
            for name in ("tokens", "targets", "loss_weights"):
                batch[name][here] = getattr(shown, name)[start:stop]
            if shown.token_types is not None:
                batch["token_types"][here] = shown.token_types[start:stop]
            for name, values in (beside(index) if beside else {}).items():
                batch[name][here] = values[start:stop]
            batch["tokens"][r, at:begin] = prompt
            if labelled and prompt:
                for name in ("targets", "loss_weights", *more):
                    batch[name][r, at] = batch[name][r, begin]
                    batch[name][r, begin] = 0
            batch["positions"][r, at : at + size] = np.arange(size)
            batch["segment_ids"][r, at : at + size] = segment
            at += size
    return batch


def _whole_rows(rows: Sequence[Bin], count: int, beside: Beside) -> dict[str, np.ndarray]:
    out = {name: np.zeros((count, size), dtype) for name, (size, dtype) in beside.rows.items()}
    for r, pieces in enumerate(rows):
        for name, values in beside.row(pieces[0].example).items():
            out[name][r, : len(values)] = values
    return out
