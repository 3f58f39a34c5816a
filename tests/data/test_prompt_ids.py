"""Virtual tokens before every example: what a batch holds, what still fits a row, and what is refused."""

import numpy as np
import pytest
import toys

from tunejax.core import errors
from tunejax.data import audit, collate, corpus, options, packing, pipeline

PROMPT = (900, 901, 902)


def load(rows, tokenizer=None, **opts):
    opts = {"max_length": 16, "prompt": PROMPT, **opts}
    return corpus.load(rows, tokenizer or toys.characters(), options.Options(**opts))


def test_a_batch_by_hand():
    loader = pipeline.make_loader(load([{"text": "abc"}, {"text": "x"}]), batch_size=2, shuffle=False, num_epochs=1)
    (batch,) = list(loader)
    a, b, c, x, eos = *toys.ids("abcx"), 2
    assert batch["tokens"].tolist() == [[*PROMPT, a, b, c] + [0] * 10, [*PROMPT, x] + [0] * 12]
    assert batch["targets"].tolist() == [[0, 0, 0, b, c, eos] + [0] * 10, [0, 0, 0, eos] + [0] * 12]
    assert batch["loss_weights"].tolist() == [[0, 0, 0, 1, 1, 1] + [0] * 10, [0, 0, 0, 1] + [0] * 12]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 4, 5] + [0] * 10
    assert batch["segment_ids"].tolist() == [[1] * 6 + [0] * 10, [1] * 4 + [0] * 12]


@pytest.mark.parametrize("strategy", packing.STRATEGIES)
def test_every_packed_piece_has_a_prompt_of_its_own(strategy):
    rng = np.random.default_rng(0)
    rows = [{"text": "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 11)))} for _ in range(30)]
    known = load(rows)
    loader = pipeline.make_loader(known, batch_size=3, packing=strategy, num_epochs=1)
    learned = 0
    for batch in loader:
        for row in range(3):
            segments = batch["segment_ids"][row]
            for s in range(1, segments.max() + 1):
                here = segments == s
                tokens, weights = batch["tokens"][row, here], batch["loss_weights"][row, here]
                assert tuple(tokens[:3]) == PROMPT
                assert (tokens[3:] < 900).all()
                assert len(tokens) > 3
                assert not weights[:3].any()
                assert batch["positions"][row, here].tolist() == list(range(len(tokens)))
        assert (batch["targets"] < 900).all()
        learned += batch["loss_weights"].sum()
    assert learned == known.store.loss_weights.sum()


def test_wrapped_rows_end_where_no_token_fits_after_a_prompt():
    bins = packing.wrap([0, 1], [7, 4], 8, extra=3)
    assert bins == [
        (packing.Piece(0, 0, 5),),
        (packing.Piece(0, 5, 7),),  # 5 positions; beside another prompt no token would fit the other 3
        (packing.Piece(1, 0, 4),),
    ]
    with pytest.raises(errors.ConfigError, match="3 virtual tokens leave no room in a row of 3"):
        packing.pack([0], [1], 3, extra=3)


def test_the_label_at_the_first_position_moves_to_the_first_virtual_token():
    rows = [{"text": "w1 w2", "label": "b"}, {"text": "w3", "label": "a"}]
    known = load(rows, toys.encoder(), objective="classification")
    (batch,) = pipeline.make_loader(known, batch_size=2, shuffle=False, num_epochs=1)
    assert batch["tokens"][0, :7].tolist() == [*PROMPT, 4, 8, 9, 5]
    assert batch["targets"][:, :5].tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert batch["loss_weights"].sum(0).tolist() == [2] + [0] * 15
    assert not batch["token_types"].any()
    last = load(rows, toys.encoder(), objective="classification", labelled="last")
    (batch,) = pipeline.make_loader(last, batch_size=2, shuffle=False, num_epochs=1)
    assert batch["loss_weights"].argmax(1).tolist() == [6, 5]


def test_a_prompt_takes_room_of_max_length():
    fits = load([{"text": "a" * 12}])  # 12 characters and the end: 13 = 16 - 3
    assert fits.store.lengths.tolist() == [12]
    with pytest.raises(errors.DataError, match="too long: 14 tokens, expected at most max_length=16 less 3 virtual"):
        load([{"text": "a" * 13}])
    assert load([{"text": "a" * 13}], truncation="end").store.lengths.tolist() == [12]
    assert load([{"text": "a" * 30}], truncation="split").store.lengths.max() == 13
    with pytest.raises(errors.ConfigError, match=r"max_length is 4, and 3 virtual tokens .*; expected 5 or more"):
        options.Options(max_length=4, prompt=PROMPT)
    with pytest.raises(errors.DataError, match="12 tokens is longer than max_length=14 less 3"):
        pipeline.make_loader(fits, batch_size=1, max_length=14)


def test_the_bucket_holds_the_prompt_too():
    loader = pipeline.make_loader(load([{"text": "a" * 6}]), batch_size=1, buckets=(8, 16), num_epochs=1)
    assert next(iter(loader))["tokens"].shape == (1, 16)


def test_another_prompt_is_other_data():
    rows = [{"text": "abc"}]
    state = pipeline.make_loader(load(rows), batch_size=1).get_state()
    with pytest.raises(errors.DataError, match="prompt"):
        pipeline.make_loader(load(rows, prompt=(7,)), batch_size=1).set_state(state)


def test_the_audit_shows_and_counts_it():
    loader = pipeline.make_loader(load([{"text": "abc"}]), batch_size=1, shuffle=False, num_epochs=1)
    (row,) = audit.sample_rows(loader, toys.characters(), 1)
    assert "<3 virtual tokens>a" in audit.render_text(row)
    assert row.padding == 16 - 6
    assert audit.totals(loader.plan.corpus, loader)["filled_share"] == 6 / 16


def test_without_one_nothing_changes():
    rows = [{"text": "abc"}, {"text": "de"}]
    (batch,) = pipeline.make_loader(load(rows, prompt=()), batch_size=2, shuffle=False, num_epochs=1)
    store = load(rows, prompt=()).store
    again = collate.collate(store, [(packing.Piece(i, 0, int(n)),) for i, n in enumerate(store.lengths)], 2, 16)
    for name in batch:
        np.testing.assert_array_equal(batch[name], again[name])
