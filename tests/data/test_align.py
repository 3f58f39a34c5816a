"""Rows by two tokenizers, aligned by the text that was read."""

import numpy as np
import pytest
import toys

from tunejax.core import errors
from tunejax.data import align, collate, corpus, options
from tunejax.data.packing import Piece

ROWS = [{"prompt": "ab cd", "completion": " ab ab c"}, {"prompt": "c", "completion": " d"}]


def load(tokenizer, rows=ROWS, **changes):
    return corpus.load(rows, tokenizer, options.Options(max_length=64, **changes)).store


def met(ours, theirs, rows, **changes):
    """What both have read at each place where a row's positions meet: [(student's text, teacher's text)] without space.

    Up to and without what they predict, by the tokenizers alone.
    """
    mine, other = (load(t, rows, **changes) for t in (ours, theirs))
    aligned = align.Aligned(mine, other, ours, theirs)
    out = []
    for i in range(len(rows)):
        at = aligned(i)["teacher_at"]
        assert not at[mine[i].loss_weights == 0].any()
        for p in np.flatnonzero(at):
            assert other[i].loss_weights[at[p] - 1]
            read = ours.decode(mine[i].tokens[: p + 1]), theirs.decode(other[i].tokens[: at[p]])
            out.append(tuple("".join(text.split()) for text in read))
    return out


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


@pytest.mark.parametrize(
    ("row", "changes", "count"),
    [
        ({"text": "ab cd ab ab c"}, {}, (10, 10)),
        ({"prompt": "ab cd", "completion": " ab ab c"}, {"completion_only_loss": False}, (10, 10)),
        ({"prompt": "ca", "completion": "b cd"}, {}, (4, 4)),  # one has a token across the end of the prompt
    ],
    ids=["text", "prompt_in_the_loss", "merged"],
)
def test_first_targets_may_lie_at_different_places(row, changes, count):
    """A tokenizer of pairs predicts "c" first where one of characters predicts "b"."""
    chars, pairs = toys.characters(), toys.merging()
    for (ours, theirs), n in zip(((pairs, chars), (chars, pairs)), count, strict=True):
        found = met(ours, theirs, [row], **changes)
        assert [a for a, _ in found] == [b for _, b in found]
        assert len(found) == n


CHAT = (
    "{%% for m in messages %%}%s{%% if m['role'] == 'assistant' %%}{%% generation %%}{{ m['content'] }}"
    "{%% endgeneration %%}{%% else %%}{{ m['content'] }}{%% endif %%}{%% endfor %%}"
)


def test_turns_of_two_chat_templates_are_compared_turn_by_turn():
    """What stands around the turns differs; a position has a place where both have read as much of the same turn."""
    chars, pairs = toys.characters(), toys.merging()
    chars.chat_template, pairs.chat_template = CHAT % "<{{ m['role'] }}:", CHAT % "{{ m['role'] }} ="
    said = ["ab d", "c ab", "d", "ab ab c"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    found = met(pairs, chars, [{"messages": turns}])
    assert len(found) == 8 + 1  # c, space, ab; ab, space, ab, space, c; and the end
    heads = ["user=abdassistant=", "<user:abd<assistant:"]
    later = [heads[0] + "cabuser=dassistant=", heads[1] + "cab<user:d<assistant:"]
    for i, (a, b) in enumerate(found):
        x, y = later if i > 2 else heads
        assert (a.startswith(x), b.startswith(y)) == (True, True)
        assert a.removeprefix(x) == b.removeprefix(y)


def test_a_word_that_one_does_not_know():
    """In the prompt it costs nothing; in what is learned, no position behind it has a place."""
    chars, pairs = toys.characters(unk_token="<unk>"), toys.merging()
    pairs.add_tokens(["\u00e9"])
    assert len(met(pairs, chars, [{"prompt": "ab \u00e9", "completion": " ab c"}])) == 5
    found = met(pairs, chars, [{"prompt": "ab", "completion": " ab \u00e9 ab c"}])
    assert found == [("ab", "ab"), ("ab", "ab"), ("abab", "abab"), ("abab", "abab")]
    assert met(chars, pairs, [{"prompt": "ab", "completion": " ab \u00e9 ab c"}])[-1] == ("abab", "abab")


def test_a_span_that_begins_elsewhere_has_no_place():
    """Prompts that differ and a token across the end of the prompt: nothing says where the two meet."""
    chars, pairs = toys.characters(unk_token="<unk>"), toys.merging()
    pairs.add_tokens(["\u00e9"])
    assert met(pairs, chars, [{"prompt": "\u00e9a", "completion": "b cd"}]) == []


def test_inside_a_letter_is_no_place():
    """Two bytes are an "\u00e9": between them neither has read a text that the other has."""
    wide, small = toys.characters(unk_token="<unk>"), toys.in_bytes()
    wide.add_tokens(["\u00e9"])
    ids = np.asarray(small("a\u00e9b")["input_ids"])
    assert align.starts(small, ids) == [0, 1, -1, 2]
    row = {"prompt": "ab", "completion": " \u00e9\u00e9 b"}
    for ours, theirs in ((wide, small), (small, wide)):
        found = met(ours, theirs, [row])
        assert len(found) == 6  # space, two letters, space, b, and the end
        assert (
            [a for a, _ in found]
            == [b for _, b in found]
            == ["ab", "ab", "ab\u00e9", *["ab\u00e9\u00e9"] * 2, "ab\u00e9\u00e9b"]
        )


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
