"""Each format against sequences worked out by hand, and bad rows of each by file, line, field."""

import numpy as np
import pytest
import toys

from tunejax.core import errors
from tunejax.data import bad, corpus, options

BOS, EOS = 1, 2


def load(rows, tokenizer=None, columns=None, **opts):
    return corpus.load(rows, tokenizer or toys.characters(), options.Options(**opts), columns=columns)


def learned(example):
    """The targets that are in the loss, and where the first stands."""
    at = np.flatnonzero(example.loss_weights)
    return example.targets[at].tolist(), int(at[0])


def test_text():
    (example,) = load([{"text": "abc"}]).store
    assert example.tokens.tolist() == toys.ids("abc")
    assert example.targets.tolist() == [*toys.ids("bc"), EOS]
    assert example.loss_weights.tolist() == [1, 1, 1]
    assert (example.tokens.dtype, example.targets.dtype, example.loss_weights.dtype) == ("int32", "int32", "float32")
    assert example.source == "rows:1"
    (example,) = load([{"text": "abc"}], append_eos=False).store
    assert example.targets.tolist() == toys.ids("bc")
    (example,) = load([{"text": "abc"}], eos_token_id=9).store
    assert example.targets[-1] == 9


def test_text_with_bos(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models/stories260k")
    (example,) = load([{"text": "Once upon"}], tokenizer).store
    expected = [*tokenizer("Once upon")["input_ids"], tokenizer.eos_token_id]
    assert expected[0] == tokenizer.bos_token_id
    assert ([*example.tokens, example.targets[-1]], example.loss_weights.all()) == (expected, True)
    (again,) = load([{"text": "Once upon</s>"}], tokenizer).store
    assert again.targets.tolist() == example.targets.tolist()


def test_prompt_completion():
    rows = [{"prompt": "2+2=", "completion": " 4"}]
    made = load(rows)
    (example,) = made.store
    assert example.tokens.tolist() == toys.ids("2+2= 4")
    assert learned(example) == ([*toys.ids(" 4"), EOS], 3)
    assert (made.report.loss_tokens, made.report.tokens, made.report.ended, made.report.merged) == (3, 6, 1, 0)
    (example,) = load(rows, completion_only_loss=False).store
    assert learned(example) == ([*toys.ids("+2= 4"), EOS], 0)


@pytest.mark.parametrize("name", ["stories260k", "gpt2_tokenizer"])
def test_prompt_completion_is_that_of_trl(assets, name):
    """TRL `SFTTrainer._prepare_dataset`: ids of prompt + completion + eos, masked by the prompt's length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / name)
    rows = [{"prompt": f"What is {i} plus two?", "completion": f"\nIt is {i + 2}, I think."} for i in range(20)]
    rows += [{"prompt": "Tim said:", "completion": " Hello, Lily!"}]
    for example, row in zip(load(rows, tokenizer).store, rows, strict=True):
        before = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        assert [*example.tokens, example.targets[-1]] == whole
        assert whole[: len(before)] == before
        assert example.loss_weights.tolist() == [float(i >= len(before)) for i in range(1, len(whole))]


def test_a_token_across_the_boundary_is_in_the_loss():
    made = load([{"prompt": "xa", "completion": "by"}, {"prompt": "xa", "completion": "y"}], toys.merging())
    assert [*made.store[0].tokens, made.store[0].targets[-1]] == [ord("x") + 3, 200, ord("y") + 3, EOS]
    assert learned(made.store[0]) == ([200, ord("y") + 3, EOS], 0)
    assert learned(made.store[1]) == ([ord("y") + 3, EOS], 1)
    assert (made.report.merged, made.report.named["merged"]) == (1, ["rows:1"])


def test_template():
    rows = [{"q": "a{prompt}", "prompt": "p", "completion": "c"}]
    (example,) = load(rows, template="Q {q} {prompt}:", format="prompt_completion").store
    assert example.tokens.tolist() == toys.ids("Q a{prompt} p:c")
    with pytest.raises(errors.DataError, match=r"rows:1: the template needs text in 'z'; found q, prompt"):
        load(rows, template="{z}")
    with pytest.raises(errors.ConfigError, match="has no field"):
        options.Options(template="prompt")


def test_classification_of_an_encoder():
    rows = [{"text": "w1 w2", "label": "yes"}, {"text": "w3", "label": "no"}, {"text": "w4", "label": "yes"}]
    made = load(rows, toys.encoder(), objective="classification")
    assert made.labels == ("no", "yes")
    assert [e.tokens.tolist() for e in made.store] == [[4, 8, 9, 5], [4, 10, 5], [4, 11, 5]]
    assert [learned(e) for e in made.store] == [([1], 0), ([0], 0), ([1], 0)]
    assert made.store[0].token_types.tolist() == [0, 0, 0, 0]


def test_classification_of_pairs_and_of_a_decoder():
    rows = [{"text": "w1", "text_pair": "w2 w3", "label": 10}, {"text": "w1", "text_pair": "w2", "label": 9}]
    made = load(rows, toys.encoder(), objective="classification")
    assert made.labels == ("9", "10")
    assert (made.store[0].tokens.tolist(), made.store[0].token_types.tolist()) == (
        [4, 8, 5, 9, 10, 5],
        [0, 0, 0, 1, 1, 1],
    )
    assert [learned(e)[0] for e in made.store] == [[1], [0]]
    last = load([{"text": "ab", "label": 1}], objective="classification", labelled="last", labels=("x", "y")).store[0]
    assert (last.tokens.tolist(), learned(last)) == (toys.ids("ab"), ([1], 1))


def test_an_encoder_keeps_its_closing_token_when_cut():
    rows = [{"text": "w1 w2 w3 w4 w5", "label": "a"}, {"text": "w1", "label": "b"}]
    made = load(rows, toys.encoder(), objective="classification", max_length=4, truncation="end")
    assert made.store[0].tokens.tolist() == [4, 8, 9, 5]
    assert (made.report.truncated, made.report.answers_cut, made.report.named["truncated"]) == (1, 0, ["rows:1"])


def test_masked_lm_marks_what_may_be_hidden():
    (example,) = load([{"text": "w1 zz"}], toys.encoder(), objective="masked_lm").store
    assert example.tokens.tolist() == [4, 8, 3, 5]
    assert example.loss_weights.tolist() == [0, 1, 0, 0]
    assert example.targets.tolist() == example.tokens.tolist()


def test_truncation(tmp_path):
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completion": "cdef"},
        {"prompt": "abcdef", "completion": "g"},
    ]
    path = toys.write(tmp_path / "x.jsonl", rows)
    with pytest.raises(errors.DataError, match=r"x\.jsonl:2: too long: 7 tokens, expected at most max_length=5"):
        load(path, max_length=5)
    kept = load(path, max_length=5, truncation="skip")
    assert (len(kept), kept.report.skipped) == (1, {bad.LONG: 2})
    assert kept.report.skipped_samples[bad.LONG][1].startswith(f"{path}:3: too long")
    with pytest.raises(errors.DataError, match=r"x\.jsonl:3: no token in the loss after it was cut to max_length"):
        load(path, max_length=5, truncation="end")
    cut = load(path, max_length=5, truncation="end", on_bad_row="skip")
    assert [len(e.tokens) for e in cut.store] == [4, 4]
    assert learned(cut.store[1]) == (toys.ids("cde"), 1)
    assert (cut.report.truncated, cut.report.answers_cut, cut.report.ended) == (1, 1, 1)
    assert cut.report.named["answers_cut"] == [f"{path}:2"]
    assert (cut.report.rows, cut.report.examples, cut.report.skipped) == (3, 2, {bad.NO_LOSS: 1})


def test_split_keeps_every_target():
    made = load([{"text": "abcdefghij"}, {"text": "k"}], max_length=4, truncation="split")
    assert [e.tokens.tolist() for e in made.store] == [toys.ids(t) for t in ("abcd", "efgh", "ij", "k")]
    assert np.concatenate([e.targets for e in made.store]).tolist() == [*toys.ids("bcdefghij"), EOS, EOS]
    assert [e.source for e in made.store] == ["rows:1"] * 3 + ["rows:2"]


BAD = [
    ({"prompt": "a"}, {}, bad.MISSING, "missing key 'completion'; found prompt"),
    ({"prompt": "a", "compeltion": "b"}, {}, bad.MISSING, r"missing key 'completion'; found prompt, compeltion\. Did"),
    ({"prompt": 3, "completion": "b"}, {}, bad.TYPE, "wrong type in 'prompt': expected text, found number 3"),
    ({"prompt": "a", "completion": None}, {}, bad.TYPE, "wrong type in 'completion': expected text, found null"),
    ({"prompt": "a", "completion": " "}, {}, bad.EMPTY, "empty 'completion': expected text, found text ' '"),
    ({"prompt": "a", "completion": "b" * 9}, {"max_length": 8}, bad.LONG, "too long: 11 tokens"),
    ({"text": ["a"]}, {"format": "text"}, bad.TYPE, r"wrong type in 'text': expected text, found list \['a'\]"),
    ({"text": "a"}, {"format": "text", "append_eos": False}, bad.NO_LOSS, "no token in the loss: 1 tokens"),
]


@pytest.mark.parametrize(("row", "opts", "reason", "message"), BAD)
def test_bad_rows(tmp_path, row, opts, reason, message):
    good = {"text": "good"} if "text" in row else {"prompt": "a", "completion": "b"}
    path = toys.write(tmp_path / "x.jsonl", [good, row, good])
    with pytest.raises(errors.DataError, match=rf"x\.jsonl:2: {message}"):
        load(path, **opts)
    made = load(path, on_bad_row="skip", **opts)
    assert (len(made), made.report.skipped, made.report.rows) == (2, {reason: 1}, 3)
    assert [e.source for e in made.store] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("label", "reason", "message"),
    [
        ("yess", bad.LABEL, r"unknown label 'yess'\. Did you mean 'yes'"),
        (5, bad.LABEL, "unknown label 5"),
        (0.5, bad.TYPE, "wrong type in 'label': expected a name or number, found number 0.5"),
        (None, bad.TYPE, "found null"),
        ("", bad.EMPTY, "empty 'label': expected a name or number"),
    ],
)
def test_bad_labels(label, reason, message):
    rows = [{"text": "w1", "label": "no"}, {"text": "w1", "label": label}]
    opts = {"objective": "classification", "labels": ("no", "yes")}
    with pytest.raises(errors.DataError, match=f"rows:2: .*{message}"):
        load(rows, toys.encoder(), **opts)
    assert load(rows, toys.encoder(), on_bad_row="skip", **opts).report.skipped == {reason: 1}


def test_a_number_is_a_place_only_among_names_that_are_words():
    opts = {"objective": "classification", "labels": ("1", "2")}
    assert load([{"text": "w1", "label": 1}], toys.encoder(), **opts).store[0].targets[0] == 0
    with pytest.raises(errors.DataError, match=r"rows:1: unknown label 0\. Choices: 1, 2"):
        load([{"text": "w1", "label": 0}], toys.encoder(), **opts)


def test_an_empty_label_is_no_class():
    rows = [{"text": "w1", "label": x} for x in ("no", "", "yes")]
    made = load(rows, toys.encoder(), objective="classification", on_bad_row="skip")
    assert (made.labels, made.report.skipped) == (("no", "yes"), {bad.EMPTY: 1})


@pytest.mark.parametrize(
    ("rows", "opts", "error", "message"),
    [
        ([{"question": "a", "answer": "b"}], {}, errors.DataError, "columns={prompt: question, completion: answer}"),
        ([{"sentence": "a"}], {}, errors.DataError, "Say data.columns={text: sentence}"),
        ([{"x": "a"}], {}, errors.DataError, "rows:1: no format has the fields x"),
        ([{"text": "a", "label": "b"}], {"objective": "classification"}, errors.DataError, "two different labels"),
        (
            [{"text": "a", "lable": "b"}],
            {"objective": "classification", "format": "classification"},
            errors.DataError,
            "rows:1: missing key 'label', as in all rows; found text, lable. Did you mean 'lable'",
        ),
        ([{"text": "a"}], {"objective": "classification"}, errors.ConfigError, "the rows have the format 'text'"),
        ([{"prompt": "a", "completion": "b"}], {"truncation": "split"}, errors.ConfigError, "for the format 'text'"),
        ([{"prompt": "a", "completion": "b"}], {"objective": "masked_lm"}, errors.ConfigError, "the format 'text'"),
        ([{"text": ""}], {"on_bad_row": "skip"}, errors.DataError, "no usable rows. Skipped: 1 empty"),
        ([], {}, errors.DataError, "no source"),
    ],
)  # fmt: skip
def test_what_does_not_fit(rows, opts, error, message):
    with pytest.raises(error, match=message):
        load(rows, **opts)


def test_options_are_checked():
    for name, value in [("format", "chat"), ("truncation", "ends"), ("max_length", 1), ("labels", ("a", "a"))]:
        with pytest.raises(errors.ConfigError, match=name):
            options.Options(**{name: value})
    with pytest.raises(errors.ConfigError, match="no end-of-sequence token"):
        load([{"text": "ab"}], toys.characters(eos_token=None))


def test_columns_name_our_fields_first():
    with pytest.raises(errors.ConfigError, match=r"data.columns names 'promt', .*Did you mean 'prompt'"):
        load([{"question": "a", "answer": "b"}], columns={"promt": "question", "completion": "answer"})


def test_lines_that_are_no_rows_count_as_read(tmp_path):
    path = toys.write(tmp_path / "x.jsonl", [{"text": "a"}, "{", "[1]", {"text": ""}, b"\xff"])
    report = load(path, on_bad_row="skip").report
    assert (report.rows, report.examples) == (5, 1)
    assert report.skipped == {bad.MALFORMED: 1, bad.TYPE: 1, bad.ENCODING: 1, bad.EMPTY: 1}
    assert report.to_dict()["skipped_samples"][bad.EMPTY] == [f"{path}:4: empty 'text': expected text, found text ''"]


def test_sources_of_different_formats():
    mixed = [corpus.Source([{"text": "a"}]), corpus.Source([{"prompt": "a", "completion": "b"}])]
    with pytest.raises(errors.DataError, match="sources of different formats"):
        load(mixed)


def test_the_assets_load(assets):
    from transformers import AutoTokenizer

    gpt2 = AutoTokenizer.from_pretrained(assets / "models/gpt2_tokenizer")
    data = assets / "data"
    opts = {"objective": "classification", "labelled": "last"}
    sst2 = load(str(data / "sst2/dev.tsv"), gpt2, {"text": "sentence"}, **opts)
    assert (len(sst2), sst2.labels, sst2.report.skipped) == (436, ("0", "1"), {})
    trec = load(str(data / "trec/test.jsonl"), gpt2, **opts)
    assert (len(trec), trec.labels) == (250, ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"))
    gsm8k = load(str(data / "gsm8k/test.jsonl"), gpt2, {"prompt": "question", "completion": "answer"})
    assert (len(gsm8k), gsm8k.report.ended, gsm8k.report.merged) == (1019, 1019, 0)
    stories = load(str(data / "tinystories_sample/valid.txt"), gpt2, max_length=2000)
    assert (len(stories), stories.report.format) == (500, "text")
