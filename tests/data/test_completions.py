"""Batches with other completions, by hand."""

import numpy as np

from tunejax.data import collate, completions
from tunejax.data.example import Store, shifted
from tunejax.data.packing import Piece


def test_prompts_and_completions_by_hand():
    store = Store([shifted([5, 6, 7, 8], [False, False, True, True], "a"), shifted([9, 4], [False, True], "b")])
    rows = [(Piece(0, 0, 3),), (Piece(1, 0, 1),)]
    batch = collate.collate(store, rows, 3, 8, prompt=(90, 91))
    asked = completions.prompts(batch, virtual=2)
    assert asked == [[5, 6], [9], []]
    new = np.array([[11, 2, 12], [13, 14, 15], [16, 2, 2]])
    got = completions.completed(asked, new, 6, stop_tokens=(2,), pad_id=3, virtual=(90, 91))
    assert got["tokens"].tolist() == [[90, 91, 5, 6, 11, 3], [90, 91, 9, 13, 14, 3], [3] * 6]
    assert got["targets"].tolist() == [[0, 0, 6, 11, 2, 0], [0, 0, 13, 14, 15, 0], [0] * 6]
    assert got["loss_weights"].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0], [0] * 6]
    assert got["positions"].tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 0], [0] * 6]
    assert got["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [0] * 6]
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in batch.items()}


def test_the_rows_own_completions_give_the_batch_back():
    rng = np.random.default_rng(0)
    examples = []
    for i in range(6):
        ids, first = rng.integers(3, 90, 7).tolist(), int(rng.integers(1, 6))
        examples.append(shifted(ids[: first + 2], [j >= first for j in range(first + 2)], f"a:{i}"))
    batch = collate.collate(Store(examples), [(Piece(i, 0, len(e.tokens)),) for i, e in enumerate(examples)], 8, 8)
    new = np.stack([e.targets[e.loss_weights > 0] for e in examples] + [np.zeros(2, np.int32)] * 2)
    got = completions.completed(completions.prompts(batch), new, 8)
    for name, want in batch.items():
        np.testing.assert_array_equal(got[name], want, err_msg=name)


def test_a_full_row_is_cut():
    got = completions.completed([[5, 6, 7]], np.array([[8, 9, 10]]), 4)
    assert got["tokens"].tolist() == [[5, 6, 7, 8]]
    assert got["targets"].tolist() == [[6, 7, 8, 9]]
    assert got["loss_weights"].tolist() == [[0, 0, 1, 1]]
