"""Virtual tokens where a template has them: what rows and batches hold, what is cut, and what is refused."""

import copy

import numpy as np
import pytest
import toys

from tunejax.core import errors
from tunejax.data import audit, corpus, options, pipeline, templates, virtual

P = (900, 901, 902)
TEMPLATE = "{virtual:1}Q{prompt}{virtual:2}="
Q, A, B, C, X, Y, SAME, EOS = *toys.ids("Qabcxy"), *toys.ids("="), 2
LABELLED = [{"text": "w1 w2 w3 w4 w5 w6", "label": "n"}, {"text": "w3", "label": "p"}]


def load(rows, tokenizer=None, **opts):
    opts = {"max_length": 16, "prompt": P, "template": TEMPLATE, **opts}
    return corpus.load(rows, tokenizer or toys.characters(), options.Options(**opts))


def batches(known, **how):
    return list(pipeline.make_loader(known, **{"batch_size": 2, "shuffle": False, "num_epochs": 1, **how}))


def test_a_batch_by_hand():
    known = load([{"prompt": "ab", "completion": "c"}, {"prompt": "x", "completion": "y"}])
    (batch,) = batches(known)
    assert batch["tokens"].tolist() == [
        [900, Q, A, B, 901, 902, SAME, C] + [0] * 8,
        [900, Q, X, 901, 902, SAME, Y] + [0] * 9,
    ]
    # A virtual token is no target, and all others are where they would be without any.
    assert batch["targets"].tolist() == [
        [Q, A, B, 0, 0, SAME, C, EOS] + [0] * 8,
        [Q, X, 0, 0, SAME, Y, EOS] + [0] * 9,
    ]
    assert batch["loss_weights"].tolist() == [[0] * 6 + [1, 1] + [0] * 8, [0] * 5 + [1, 1] + [0] * 9]
    assert batch["positions"].tolist() == [[*range(8)] + [0] * 8, [*range(7)] + [0] * 9]
    assert batch["segment_ids"].tolist() == [[1] * 8 + [0] * 8, [1] * 7 + [0] * 9]


@pytest.mark.parametrize("strategy", ["bfd", "first_fit"])
def test_packed(strategy):
    known = load([{"prompt": "ab", "completion": "c"}, {"prompt": "x", "completion": "y"}])
    (batch,) = batches(known, batch_size=1, packing=strategy)
    assert batch["tokens"].tolist() == [[900, Q, A, B, 901, 902, SAME, C, 900, Q, X, 901, 902, SAME, Y, 0]]
    assert batch["targets"].tolist() == [[Q, A, B, 0, 0, SAME, C, EOS, Q, X, 0, 0, SAME, Y, EOS, 0]]
    assert np.flatnonzero(batch["loss_weights"]).tolist() == [6, 7, 13, 14]
    assert batch["positions"].tolist() == [[*range(8), *range(7), 0]]
    assert batch["segment_ids"].tolist() == [[1] * 8 + [2] * 7 + [0]]


def test_the_whole_text_in_the_loss_has_the_targets_that_it_has_without_virtual_tokens():
    rows = [{"prompt": "ab", "completion": "c"}]
    (example,) = load(rows, completion_only_loss=False).store
    (plain,) = load(rows, completion_only_loss=False, template="Q{prompt}=", prompt=()).store
    learned = example.loss_weights > 0
    assert example.targets[learned].tolist() == plain.targets[plain.loss_weights > 0].tolist()
    assert learned.tolist() == [False, True, True, False, False, True, True, True]


def test_what_follows_the_last_virtual_token_is_learned_from_it():
    (example,) = load([{"prompt": "ab", "completion": "c"}], template="{prompt}{virtual:3}").store
    assert example.tokens.tolist() == [A, B, *P, C]
    assert example.targets.tolist() == [B, 0, 0, 0, C, EOS]
    assert example.loss_weights.tolist() == [0, 0, 0, 0, 1, 1]


def test_an_added_token_that_shares_an_id_with_another_is_told_by_name():
    tokenizer = toys.characters()  # 131 entries, <unk> is 131: where an added token goes
    (example,) = load([{"prompt": "\u00e9", "completion": "c"}], tokenizer).store
    assert example.tokens.tolist() == [900, Q, 131, 901, 902, SAME, C]
    assert len(tokenizer) == 131
    assert len(tokenizer("\ue0000\ue001")["input_ids"]) == 3


def test_a_mark_in_a_rows_text_is_text():
    (example,) = load([{"prompt": "{virtual:1}", "completion": "c"}], max_length=32).store
    assert example.tokens.tolist() == [900, Q, *toys.ids("{virtual:1}"), 901, 902, SAME, C]
    with pytest.raises(errors.DataError, match="the template's 3 virtual tokens are not all left"):
        load([{"prompt": virtual.named("{virtual:1}"), "completion": "c"}], max_length=32)


def test_all_of_max_length_is_the_rows():
    rows = [{"prompt": "a" * 10, "completion": "c"}]  # 1 + 10 + 1 characters, 3 virtual tokens, c and the end: 17
    with pytest.raises(errors.DataError, match=r"too long: 17 tokens, expected at most max_length=16 \(data"):
        load(rows)
    (example,) = load(rows, max_length=17).store
    assert len(example.tokens) == 16
    known = load(rows, max_length=17)
    assert pipeline.make_loader(known, batch_size=1, packing=True).plan.settings.prompt == ()


def test_no_virtual_token_is_cut_away():
    rows = [{"prompt": "ab", "completion": "cc"}, {"prompt": "a" * 20, "completion": "c"}]
    for opts in ({}, {"completion_only_loss": False}):
        known = load(rows, truncation="end", on_bad_row="skip", **opts)
        assert (len(known), known.report.skipped) == (1, {"too long": 1})
    (example,) = load(rows[:1], truncation="end", max_length=8).store
    assert example.tokens.tolist() == [900, Q, A, B, 901, 902, SAME]


def test_labelled_rows_in_a_template():
    known = load(LABELLED, toys.encoder(), objective="classification", template="{virtual:2}{text} w9 {virtual:1}")
    (batch,) = batches(known)
    assert batch["tokens"].tolist() == [
        [4, 900, 901, 8, 9, 10, 11, 12, 13, 16, 902, 5] + [0] * 4,
        [4, 900, 901, 10, 16, 902, 5] + [0] * 9,
    ]
    assert batch["targets"].tolist() == [[0] * 16, [1] + [0] * 15]
    assert batch["loss_weights"].sum(0).tolist() == [2] + [0] * 15
    last = load(LABELLED, toys.encoder(), objective="classification", template="{text}{virtual:3}", labelled="last")
    assert batches(last)[0]["loss_weights"].argmax(1).tolist() == [10, 5]
    pair = [{"text": "w1", "text_pair": "w2", "label": i} for i in range(2)]
    (both, _) = load(pair, toys.encoder(), objective="classification", template="{text_pair}{virtual:3}{text}").store
    assert both.tokens.tolist() == [4, 9, *P, 8, 5]


def test_truncation_shortens_the_field_and_leaves_the_template():
    opts = {"objective": "classification", "template": "{virtual:2}{text} w9 {virtual:1}", "truncation": "end"}
    known = load(LABELLED, toys.encoder(), max_length=9, **opts)
    assert known.store[0].tokens.tolist() == [4, 900, 901, 8, 9, 10, 16, 902, 5]
    assert known.report.truncated == 1
    with pytest.raises(errors.DataError, match="too long: 12 tokens, expected at most max_length=5\n"):
        load(LABELLED, toys.encoder(), max_length=5, **opts)


def test_two_fields_lose_their_ends_the_longest_first():
    rows = [{"text": "w1 w2 w3 w4 w5", "text_pair": "w6 w7", "label": i} for i in range(2)]
    opts = {"objective": "classification", "template": "{text} w9 {text_pair}", "truncation": "end", "prompt": ()}
    for length, expected in ((8, [8, 9, 10, 16, 13, 14]), (5, [8, 16, 13]), (4, [16, 13])):
        assert load(rows, toys.encoder(), max_length=length, **opts).store[0].tokens.tolist() == [4, *expected, 5]


def test_a_character_of_several_tokens_is_cut_whole():
    from tokenizers import models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte = toys._fast(models.BPE({c: i for i, c in enumerate(letters)}, []), pre_tokenizers.ByteLevel(False))
    made = templates.shortened(byte, "{text}.", {"text": "a\u00e9\u00e9"}, 5)  # 1 + 2 + 2 bytes and the point: 6
    assert made["input_ids"] == byte("a\u00e9.")["input_ids"]
    assert templates.shortened(byte, "{text}...", {"text": "ab"}, 2) is None
    assert templates.shortened(byte, "abc", {}, 2) is None


def test_a_cloze_has_its_label_at_the_mask():
    opts = {"objective": "cloze", "labels": ("p", "n"), "template": "{virtual:2}{text} w9 {mask} {virtual:1}"}
    known = load(LABELLED, toys.encoder(), max_length=10, truncation="end", **opts)
    (batch,) = batches(known)
    assert batch["tokens"].tolist() == [[4, 900, 901, 8, 9, 10, 16, 6, 902, 5], [4, 900, 901, 10, 16, 6, 902, 5, 0, 0]]
    assert batch["targets"].tolist() == [[0] * 7 + [1, 0, 0], [0] * 10]
    assert batch["loss_weights"].tolist() == [[0] * 7 + [1, 0, 0], [0] * 5 + [1] + [0] * 4]
    front = load(LABELLED, toys.encoder(), **{**opts, "template": "{text} {mask}"})
    (batch,) = batches(front)
    assert batch["tokens"][1, :7].tolist() == [*P, 4, 10, 6, 5]
    assert batch["loss_weights"][1].tolist() == [0, 0, 0, 0, 0, 1] + [0] * 10
    bare = load(LABELLED, toys.characters(mask_token="~"), **{**opts, "template": "{mask}{text}", "max_length": 32})
    assert batches(bare)[0]["loss_weights"].argmax(1).tolist() == [3, 3]
    with pytest.raises(errors.DataError, match="rows:1: found 2 mask tokens; expected the template's alone"):
        load([{"text": "w1 [MASK]", "label": "n"}], toys.encoder(), **opts)
    with pytest.raises(errors.ConfigError, match="the tokenizer has no mask token"):
        load(LABELLED, toys.characters(), **opts)
    with pytest.raises(errors.ConfigError, match="packing does not go with cloze"):
        pipeline.make_loader(known, batch_size=1, packing=True)
    with pytest.raises(errors.ConfigError, match=r"needs one with '\{mask\}' once"):
        options.Options(objective="cloze", template="{text}")


def test_the_audit_shows_them_where_they_stand():
    known = load([{"prompt": "ab", "completion": "c"}, {"prompt": "x", "completion": "y"}])
    loader = pipeline.make_loader(known, batch_size=1, packing=True, shuffle=False, num_epochs=1)
    (row,) = audit.sample_rows(loader, toys.characters(), 1)
    assert "<1 virtual token>Qab<2 virtual tokens>=[[c</s>]] |cut| <1 virtual token>Qx" in audit.render_text(row)
    assert row.padding == 1
    opts = {"objective": "classification", "labelled": "last", "template": "{text}{virtual:3}"}
    loader = pipeline.make_loader(load(LABELLED, toys.characters(), max_length=64, **opts), batch_size=2, shuffle=False)
    assert "w3[[<3 virtual tokens> -> p" in audit.render_text(audit.sample_rows(loader, toys.characters(), 2)[1])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{virtual:2}{prompt}", r"places 2 virtual tokens \(\{virtual:2\}\), and the method trains 3: expected all"),
        ("{virtual:2}{prompt}{virtual:2}", r"places 4 virtual tokens \(\{virtual:2\}, \{virtual:2\}\).* trains 3"),
        ("{virtual}{prompt}", r"holds '\{virtual\}'; expected such as '\{virtual:3\}'"),
        ("{virtual: 3}{prompt}", r"holds '\{virtual: 3\}'"),
        ("{virtual:0}{prompt}", r"holds '\{virtual:0\}'"),
        ("{virtual:3", r"holds '\{virtual:3'"),
    ],
)
def test_templates_that_are_refused(template, message):
    with pytest.raises(errors.ConfigError, match=message):
        options.Options(template=template, prompt=P)


def test_rows_without_a_template_are_refused():
    with pytest.raises(
        errors.ConfigError,
        match="the rows have the format 'text', which takes none; expected prompt_completion or class",
    ):
        load([{"text": "ab"}])


def test_without_a_mark_all_stand_in_front():
    (batch,) = batches(load([{"prompt": "ab", "completion": "c"}], template="Q{prompt}="), batch_size=1)
    assert batch["tokens"][0, :8].tolist() == [*P, Q, A, B, SAME, C]


def test_a_sentencepiece_tokenizer_reads_the_text_as_beside_a_special_token(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models/stories260k")
    inner = copy.deepcopy(tokenizer)
    inner.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    ours = dict(zip(inner.convert_tokens_to_ids(["<one>", "<two>"]), (9000, 9001), strict=True))
    row, template = {"prompt": "Once upon", "completion": " a time"}, "{virtual:1}{prompt}{virtual:1}"
    (example,) = load([row], tokenizer, template=template, prompt=(9000, 9001), max_length=32).store
    expected = [ours.get(i, i) for i in inner("<one>Once upon<two> a time")["input_ids"]]
    assert example.tokens.tolist() == expected
    assert expected[:2] == [tokenizer.bos_token_id, 9000]
