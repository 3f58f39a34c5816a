"""Rows by two tokenizers, aligned by the text that was read."""

import numpy as np
import pytest
import toys

from tunejax.core import errors
from tunejax.data import align, collate, corpus, options
from tunejax.data.packing import Piece

ROWS = [{"prompt": "ab cd", "completion": " ab ab c"}, {"prompt": "c", "completion": " d"}]


def load(tokenizer):
    return corpus.load(ROWS, tokenizer, options.Options(max_length=64)).store


def test_starts_leave_space_out():
    chars = toys.characters()
    assert align.starts(chars, np.asarray(toys.ids(" ab c"))) == [0, 0, 1, 2, 2]
    assert align.starts(toys.merging(), np.asarray([200, 35, 200])) == [0, 2, 2]


def test_places():
    assert align.places([0, 2, 2, 3, 5], [0, 0, 1, 2, 3, 3]) == [0, 3, 3, 4, -1]


def test_positions_that_read_the_same_text_meet():
    """Characters beside pairs: a student of pairs finds each of its positions, one of characters every second."""
    chars, pairs = toys.characters(), toys.merging()
    few, many = load(pairs), load(chars)
    aligned = align.Aligned(few, many, pairs, chars)
    for i in range(len(ROWS)):
        at, ours, theirs = aligned(i)["teacher_at"], few[i], many[i]
        assert not at[ours.loss_weights == 0].any()
        assert (at[ours.loss_weights > 0] > 0).all()
        for position in np.flatnonzero(at):
            # What both have read, up to and without what they predict.
            a, b = pairs.decode(ours.tokens[: position + 1]), chars.decode(theirs.tokens[: at[position]])
            assert a.replace(" ", "") == b.replace(" ", "")
        row = aligned.row(i)
        np.testing.assert_array_equal(row["teacher_tokens"], theirs.tokens)
        assert row["teacher_mask"].all()
    back = align.Aligned(many, few, chars, pairs)(0)["teacher_at"]
    assert 0 < np.count_nonzero(back) < np.count_nonzero(many[0].loss_weights)


def test_a_batch_has_both_and_rows_without_a_partner_have_none():
    chars, pairs = toys.characters(), toys.merging()
    few = load(pairs)
    many = corpus.load(ROWS[:1], chars, options.Options(max_length=64)).store
    aligned = align.Aligned(few, many, pairs, chars)
    pieces = [(Piece(1, 0, len(few[1].tokens)),), (Piece(0, 0, len(few[0].tokens)),)]
    batch = collate.collate(few, pieces, 3, 16, prompt=(300,), beside=aligned)
    assert batch["teacher_tokens"].shape == batch["teacher_mask"].shape == (3, 32)
    assert not batch["teacher_mask"][[0, 2]].any()
    assert not batch["teacher_at"][[0, 2]].any()
    n = len(many[0].tokens)
    assert batch["teacher_tokens"][1, :n].tolist() == many[0].tokens.tolist()
    assert batch["teacher_mask"][1].sum() == n
    assert batch["teacher_at"][1, 1 : 1 + len(few[0].tokens)].tolist() == aligned(0)["teacher_at"].tolist()


def test_cut_rows_are_refused():
    chars = toys.characters()
    texts = [{"text": "a" * 40}]
    cut = corpus.load(texts, chars, options.Options(max_length=16, truncation="split")).store
    with pytest.raises(errors.ConfigError, match="something else than split"):
        align.Aligned(cut, cut, chars, chars)
