"""Packing keeps its invariants on random lengths; orders are permutations that depend on the seed and epoch alone."""

import numpy as np
import pytest

from tunejax.core import errors
from tunejax.data import collate, order, packing
from tunejax.data.example import Example, Store, shifted


def cases(count=60):
    rng = np.random.default_rng(0)
    for _ in range(count):
        capacity = int(rng.integers(1, 40))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(0, 60)))
        yield rng.permutation(len(lengths)), lengths, capacity, int(rng.integers(1, 30))


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_every_token_once_and_no_row_too_long(strategy):
    for indices, lengths, capacity, window in cases():
        bins = packing.pack(indices, lengths, capacity, strategy=strategy, window=window)
        assert bins == packing.pack(indices, lengths, capacity, strategy=strategy, window=window)
        assert all(0 < sum(p.stop - p.start for p in b) <= capacity for b in bins)
        found = sorted(p for b in bins for p in b)
        if strategy != "wrapped":
            assert found == [(i, 0, n) for i, n in enumerate(lengths)]
        else:
            assert [(p.example, t) for p in found for t in range(p.start, p.stop)] == [
                (i, t) for i, n in enumerate(lengths) for t in range(n)
            ]
            assert all(sum(p.stop - p.start for p in b) == capacity for b in bins[:-1])


def test_best_fit_by_hand():
    assert packing.best_fit_decreasing([3, 7, 5, 3, 2], 10) == [[0, 1], [2, 3, 4]]
    assert packing.first_fit([3, 7, 5, 3, 2], 10) == [[0, 1], [2, 3, 4]]
    assert packing.first_fit([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert packing.best_fit_decreasing([6, 7, 3, 4], 10) == [[0, 3], [1, 2]]


def test_best_fit_is_never_worse_than_a_known_bound():
    """Best fit decreasing uses at most 11/9 OPT + 4 bins (Johnson 1973); OPT is at least the sum over capacity."""
    for indices, lengths, capacity, _ in cases():
        least = -(-int(lengths.sum()) // capacity)
        least = max(least, int((lengths * 2 > capacity).sum()))
        assert least <= len(packing.pack(indices, lengths, capacity)) <= 11 / 9 * least + 4


def test_too_long_and_unknown():
    for strategy in ("bfd", "first_fit"):
        with pytest.raises(errors.DataError, match="an example of 5 tokens does not fit a row of 4"):
            packing.pack([0], [5], 4, strategy=strategy)
    with pytest.raises(errors.ConfigError, match="Did you mean 'bfd'"):
        packing.pack([0], [5], 4, strategy="bdf")


def test_collate_by_hand():
    store = Store([shifted([5, 6, 7], [False, False, True], "a:1"), shifted([8, 9], [True, True], "a:2")])
    pieces = [packing.Piece(0, 0, 2), packing.Piece(1, 0, 1)]
    batch = collate.collate(store, [tuple(pieces), (packing.Piece(0, 1, 2),)], 3, 4, pad_id=3)
    assert batch["tokens"].tolist() == [[5, 6, 8, 3], [6, 3, 3, 3], [3, 3, 3, 3]]
    assert batch["targets"].tolist() == [[6, 7, 9, 0], [7, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["loss_weights"].tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert {k: v.dtype.name for k, v in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "loss_weights": "float32",
        "positions": "int32",
        "segment_ids": "int32",
    }


def test_store_gives_back_examples():
    types = np.asarray([0, 1], np.int32)
    made = [shifted([1, 2, 3], [True] * 3, "a"), Example(*(np.asarray([4, 5], t) for t in "iif"), "b", types)]
    store = Store(made)
    for one, other in zip(store, made, strict=True):
        assert one.source == other.source
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.loss_weights, other.loss_weights)
    assert [e.token_types.tolist() for e in store] == [[0, 0], [0, 1]]
    assert store.digest != Store(made[:1]).digest
    with pytest.raises(IndexError):
        store[2]


def test_buckets():
    assert collate.default_buckets(200) == (32, 64, 128, 200)
    assert collate.default_buckets(20) == (20,)
    assert collate.default_buckets(69, 16) == (16, 32, 48, 64, 69)
    assert collate.default_buckets(64, 16) == (16, 32, 48, 64)
    assert collate.default_buckets(20, 32) == collate.default_buckets(20, 20) == (20,)
    assert [collate.bucket(n, (32, 64)) for n in (1, 32, 33, 64)] == [32, 32, 64, 64]
    with pytest.raises(errors.DataError, match="longer than the largest padding bucket 64"):
        collate.bucket(65, (32, 64))


def test_permutations():
    first = order.permutation(1000, 7, 0)
    assert sorted(first.tolist()) == list(range(1000))
    assert first[:8].tolist() == order.permutation(1000, 7, 0)[:8].tolist()
    for other in (order.permutation(1000, 7, 1), order.permutation(1000, 8, 0), np.arange(1000)):
        assert (first == other).sum() < 10
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.15


def test_a_permutation_is_the_same_on_every_machine():
    assert order.permutation(10, 0, 2, 0).tolist() == [8, 7, 2, 4, 0, 5, 1, 3, 6, 9]


def test_weights_draw_rows_more_or_less_often():
    parts = ((4, 1.0), (3, 2.0), (6, 0.5))
    for epoch in range(4):
        counts = np.bincount(order.epoch_order(parts, 3, epoch), minlength=13)
        assert counts[:7].tolist() == [1] * 4 + [2] * 3
        assert counts[7:].sum() == 3
    two = np.concatenate([order.epoch_order(parts, 3, e) for e in (0, 1)])
    assert np.bincount(two, minlength=13)[7:].tolist() == [1] * 6
    assert order.epoch_order(((2, 1), (1, 2)), 0, 5, shuffle=False).tolist() == [0, 1, 2, 2]
    assert not np.array_equal(order.epoch_order(parts, 3, 0), order.epoch_order(parts, 4, 0))
