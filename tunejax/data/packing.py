"""Packing: which examples share a row. Deterministic, from lengths alone, so every host makes the same plan."""

import bisect
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tunejax.core import errors

STRATEGIES = ("bfd", "first_fit", "wrapped")
WINDOW = 2048
"""Examples that are fitted together. Larger ones waste less and keep less of the shuffled order."""


class Piece(NamedTuple):
    """Positions [start, stop) of one example, by its index."""

    example: int
    start: int
    stop: int


Bin = tuple[Piece, ...]


def pack(
    order: Iterable[int],
    lengths: Sequence[int] | np.ndarray,
    capacity: int,
    *,
    strategy: str = "bfd",
    window: int = WINDOW,
    extra: int = 0,
) -> list[Bin]:
    """Rows of at most ``capacity`` positions, in about the given order.

    Args:
      order: example indices, each at most once a row.
      lengths: of the examples; at most ``capacity``, unless wrapped.
      strategy: "bfd" best fit by decreasing length within windows of ``window`` examples, and "first_fit" in order:
        neither splits an example. "wrapped" fills every row and splits the example at its end.
      extra: positions that every piece takes besides its own (a prompt before it).

    Raises:
      DataError: an example longer than ``capacity``.
      ConfigError: an unknown strategy, or no room beside ``extra``.
    """
    if strategy not in STRATEGIES:
        raise errors.ConfigError(f"packing strategy {strategy!r}. {errors.did_you_mean(strategy, STRATEGIES)}")
    if extra >= capacity:
        raise errors.ConfigError(f"{extra} virtual tokens leave no room in a row of {capacity} positions")
    indices = [int(i) for i in order]
    if strategy == "wrapped":
        return wrap(indices, lengths, capacity, extra)
    fit = best_fit_decreasing if strategy == "bfd" else first_fit
    bins: list[Bin] = []
    for at in range(0, len(indices), window):
        part = indices[at : at + window]
        sizes = [int(lengths[i]) + extra for i in part]
        for members in fit(sizes, capacity):
            bins.append(tuple(Piece(part[m], 0, sizes[m] - extra) for m in members))
    return bins


def _check(sizes: Sequence[int], capacity: int) -> None:
    longest = max(sizes, default=0)
    if longest > capacity:
        raise errors.DataError(f"an example of {longest} tokens does not fit a row of {capacity}")


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of positions into ``sizes``: the longest first, each to the fullest bin that has room.

    Bins come in the order of their first members, and members in theirs, so a shuffled order stays shuffled.
    """
    _check(sizes, capacity)
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(rooms, (sizes[item], -1))
        room, chosen = rooms.pop(at) if at < len(rooms) else (capacity, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(item)
        if room > sizes[item]:
            bisect.insort(rooms, (room - sizes[item], chosen))
    return sorted(sorted(members) for members in bins)


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of positions into ``sizes``: in order, each to the first bin that has room."""
    _check(sizes, capacity)
    rooms: list[int] = []
    bins: list[list[int]] = []
    for item, size in enumerate(sizes):
        at = next((b for b, room in enumerate(rooms) if room >= size), len(bins))
        if at == len(bins):
            bins.append([])
            rooms.append(capacity)
        bins[at].append(item)
        rooms[at] -= size
    return bins


def wrap(indices: Sequence[int], lengths: Sequence[int] | np.ndarray, capacity: int, extra: int = 0) -> list[Bin]:
    """Rows filled to the brim in order; an example that does not fit goes on in the next row.

    Each piece takes ``extra`` positions more, so a row may end with as many positions empty.
    """
    bins: list[Bin] = []
    held: list[Piece] = []
    room = capacity
    for index in indices:
        start, stop = 0, int(lengths[index])
        while start < stop:
            taken = min(room - extra, stop - start)
            held.append(Piece(index, start, start + taken))
            start, room = start + taken, room - taken - extra
            if room <= extra:
                bins.append(tuple(held))
                held, room = [], capacity
    return [*bins, tuple(held)] if held else bins
