"""The order of an epoch: a shuffle that depends on the seed and the epoch only, on every machine and version."""

from collections.abc import Sequence

import numpy as np

_GAMMA, _M1, _M2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's scrambling of uint64s (Steele, Lea, Flood 2014), elementwise."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def stream(*key: int) -> np.uint64:
    """A uint64 that stands for a key of integers."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix64(state + _GAMMA + np.asarray([part & 0xFFFFFFFFFFFFFFFF], np.uint64))
    return state[0]


def permutation(n: int, *key: int) -> np.ndarray:
    """int64 [n]: 0 to n - 1 shuffled. `numpy.random` promises no order across its versions; this is one for good."""
    drawn = mix64((np.arange(1, n + 1, dtype=np.uint64) * _GAMMA) + np.full(n, stream(*key), np.uint64))
    return np.argsort(drawn, kind="stable")


def epoch_order(parts: Sequence[tuple[int, float]], seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Indices of the examples of an epoch, in their order.

    Args:
      parts: (examples, weight) a source. In an epoch ``examples * weight`` of a source are drawn, going on through
        its own shuffled passes, so a weight of 0.5 sees all of it in two epochs and 2 sees all of it twice in one.
      shuffle: False: the sources one after the other, each in the order of its rows.
    """
    drawn, offset = [], 0
    for number, (size, weight) in enumerate(parts):
        start, stop = (int(size * weight * e + 0.5) for e in (epoch, epoch + 1))
        positions = np.arange(start, stop)
        within = positions % max(size, 1)
        if shuffle and weight != 1:
            for lap in np.unique(positions // size):
                here = positions // size == lap
                within[here] = permutation(size, seed, 1, number, int(lap))[within[here]]
        drawn.append(offset + within)
        offset += size
    order = np.concatenate(drawn) if drawn else np.zeros(0, np.int64)
    return order[permutation(len(order), seed, 2, epoch)] if shuffle else order
