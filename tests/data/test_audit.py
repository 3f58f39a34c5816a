"""What `preprocess` shows, against rows whose tokens are known."""

import json

import pytest
import toys

from tunejax.data import audit, corpus, mlm, options, pipeline

PAIRS = [
    {"prompt": "2+2=", "completion": " 4"},
    {"prompt": "ab", "completion": "c" * 30},
    {"prompt": "x", "completion": "y"},
]


def pairs(**opts):
    return corpus.load(PAIRS, toys.characters(), options.Options(**{"max_length": 16, "truncation": "end", **opts}))


def rows(made, count=9, tokenizer=None, **opts):
    loader = pipeline.make_loader(made, batch_size=2, shuffle=False, num_epochs=1, **opts)
    return audit.sample_rows(loader, tokenizer or toys.characters(), count)


def test_rows_as_text():
    found = [audit.render_text(r) for r in rows(pairs(), packing=True)]
    assert found == [
        "rows:1, rows:3\n2+2=[[ 4</s>]] |cut| x[[y</s>]] |8 padding|",
        "rows:2\nab[[cccccccccccccc]] |1 padding|",
    ]
    found = rows(pairs(), buckets=(16,))
    assert [r.sources for r in found] == [("rows:1",), ("rows:2",), ("rows:3",)]
    token = found[0].segments[0][-1]
    assert (token.text, token.in_loss, token.special, token.end) == ("</s>", True, True, True)


def test_rows_in_colour():
    text = audit.render_rich(rows(pairs(), packing=True)[0])
    assert "2+2= 4</s> ┃cut┃ xy</s> ┃8 padding┃" in text.plain
    styles = {text.plain[s.start : s.end]: str(s.style) for s in text.spans}
    assert "reverse" in styles["</s>"]
    assert "green" in styles["4"]
    assert "dim" in styles["+"]


def test_totals_name_cut_answers():
    made = pairs()
    loader = pipeline.make_loader(made, batch_size=2, packing=True, shuffle=False, num_epochs=1)
    found = audit.totals(made, loader)
    json.dumps(found)
    assert (found["examples"], found["tokens"], found["loss_tokens"]) == (3, 6 + 15 + 2, 3 + 14 + 2)
    assert (found["truncated"], found["answers_cut"], found["ended"]) == (1, 1, 2)
    assert (found["batches"], found["filled_share"]) == (1, 23 / 32)
    assert found["lengths"]["longest"] == 15
    assert sum(n for *_, n in found["lengths"]["histogram"]) == 3
    said = audit.render_totals(found)
    assert "warning: 1 of 3 rows lose the end of what they teach at max_length (rows:2)" in said
    assert "1 of 3 rows do not end with an end-of-sequence token" in said
    assert "in loss    19 tokens (82.6%)" in said
    assert "1 an epoch, 71.9% of positions filled" in said


def test_skipped_rows_and_merged_boundaries_are_said():
    bad_and_merged = [{"prompt": "xa", "completion": "by"}, {"prompt": "", "completion": "b"}]
    made = corpus.load(bad_and_merged, toys.merging(), options.Options(on_bad_row="skip"))
    said = audit.render_totals(audit.totals(made))
    assert "skipped    1 empty" in said
    assert "sample     rows:2: empty 'prompt'" in said
    assert "1 of 1 rows have a token that reaches from the prompt into the completion (rows:1)" in said


def test_labels_and_masks():
    labelled = [{"text": "w1 w2", "label": "yes"}, {"text": "w3", "label": "no"}, {"text": "w4", "label": "no"}]
    made = corpus.load(labelled, toys.encoder(), options.Options(objective="classification"))
    (row, *_) = rows(made, tokenizer=toys.encoder(), buckets=(8,))
    assert audit.render_text(row).startswith("rows:1\n[[[CLS] -> yes]]")
    assert audit.totals(made)["labels"] == {"no": 2, "yes": 1}
    assert "labels     no: 2, yes: 1" in audit.render_totals(audit.totals(made))
    made = corpus.load([{"text": "w1"}], toys.encoder(), options.Options(objective="masked_lm"))
    (row,) = rows(made, tokenizer=toys.encoder(), buckets=(4,), masking=mlm.Masking(6, 17))
    assert [t.in_loss for t in row.segments[0]] == [False, True, False]


@pytest.mark.parametrize("name", ["stories260k", "gpt2_tokenizer"])
def test_tokens_read_as_the_text(assets, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / name)
    text = "Once upon a time, Lily said: I am 7!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(audit.token_texts(tokenizer, ids)).strip() == text


def test_histogram():
    import numpy as np

    assert audit.histogram(np.asarray([1, 2, 2, 3])) == [[1, 1, 1], [2, 2, 2], [3, 3, 1]]
    assert audit.histogram(np.asarray([1, 20])) == [
        [1, 2, 1],
        *([2 * i + 1, 2 * i + 2, 0] for i in range(1, 9)),
        [19, 20, 1],
    ]
