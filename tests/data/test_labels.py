"""Which class a label is: in the order of a trained head, of a data set's `ClassLabel`, or sorted."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toys

from tunejax.core import errors
from tunejax.data import bad, corpus, labels, options
from tunejax.data import rows as row_lib

NAMES = ["pos", "neg", "mid"]


@pytest.fixture(params=["parquet", "saved"])
def stored(request, tmp_path, monkeypatch):
    """Numbers -> a data set of such rows, whose features name the classes in no alphabetical order."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def store(numbers, names=NAMES):
        kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        texts = [f"w{i}" for i in range(len(numbers))]
        data = datasets.Dataset.from_dict({"text": texts, "label": numbers}, features=kinds)
        assert data.features["label"].int2str(0) == names[0]
        if request.param == "parquet":
            data.to_parquet(tmp_path / "x.parquet")
            return tmp_path / "x.parquet"
        data.save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return store


def load(source, **opts):
    columns = opts.pop("columns", None)
    return corpus.load(source, toys.encoder(), options.Options(objective="classification", **opts), columns=columns)


def numbers(made):
    """The class of each row."""
    return [int(e.targets[0]) for e in made.store]


def test_a_data_sets_classes_keep_their_order(stored):
    made = load(stored([0, 1, 0, 1]))  # the third class has no rows
    assert (made.labels, numbers(made)) == (("pos", "neg", "mid"), [0, 1, 0, 1])


def test_rows_without_a_label_are_bad(stored):
    source = stored([0, -1, 1])
    with pytest.raises(errors.DataError, match=r":2: no label: -1 is the number of none of .*classes, pos, neg, mid"):
        load(source)
    made = load(source, on_bad_row="skip")
    assert (made.labels, numbers(made), made.report.skipped) == (("pos", "neg", "mid"), [0, 1], {bad.UNLABELLED: 1})


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["neg", "mid", "pos"], [2, 0, 1]), (["0", "1", "2"], [0, 1, 2]), (["a", "b", "c"], [0, 1, 2])],
)
def test_given_labels_are_names_numbers_or_names_of_ones_own(stored, given, expected):
    assert numbers(load(stored([0, 1, 2]), labels=tuple(given))) == expected


def test_names_that_are_numbers_are_no_places(stored):
    made = load(stored([0, 1, 2], names=["3", "2", "1"]))
    assert (made.labels, numbers(made)) == (("3", "2", "1"), [0, 1, 2])


def test_the_order_is_that_of_the_renamed_column(stored):
    rows = row_lib.read_rows(stored([1, 0]), columns={"class": "label"})
    assert [r.fields["class"] for r in rows] == ["neg", "pos"]
    made = load([dict(r.fields) for r in rows], columns={"label": "class"})
    assert made.labels == ("pos", "neg", "mid")


def test_sources_of_several_orders_are_sorted(stored):
    sources = [corpus.Source(stored([0, 1])), corpus.Source([{"text": "w5", "label": "other"}])]
    assert load(sources).labels == ("neg", "other", "pos")


def test_other_metadata_of_a_parquet_file_says_nothing(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"text": "w1", "label": 2}, {"text": "w2", "label": 10}])
    for noted in (b"{", b"[1]", b'{"info": {"features": {"label": 3}}}'):
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": noted}), tmp_path / "x.parquet")
        assert load(tmp_path / "x.parquet").labels == ("2", "10")


def rows(*values):
    return [row_lib.Row({"text": "a", "label": v}, f"rows:{i}") for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "known", "expected"),
    [
        (["a", "b"], ["b", "a"], ("b", "a")),
        (["a"], ["b", "a", "c"], ("b", "a", "c")),
        (["positive", "negative"], ["POSITIVE", "NEGATIVE", "MIXED"], ("positive", "negative", "MIXED")),
        (["a", "d"], ["b", "a"], ("a", "d")),
        ([1, 0], ["b", "a"], ("0", "1")),
        ([2, 0], ["LABEL_0", "LABEL_1", "LABEL_2"], ("0", "1", "2")),
        (["0", "2"], ["x", "y", "z"], ("0", "1", "2")),
        ([1, 2, 3], ["x", "y", "z"], ("1", "2", "3")),
        ([1, 2], ["2", "1"], ("2", "1")),
        (["LABEL_10", "LABEL_9"], [f"LABEL_{i}" for i in range(11)], tuple(f"LABEL_{i}" for i in range(11))),
        (["b", "a"], [], ("a", "b")),
    ],
)
def test_the_heads_names_are_taken_where_they_cover_the_rows(values, known, expected):
    assert labels.names(rows(*values), known) == expected


@pytest.mark.parametrize(
    ("names", "known", "advice"),
    [
        (["neg", "pos"], ["pos", "neg"], "set data.labels=[pos, neg], or leave it out"),
        (["neg", "pos"], ["POS", "NEG"], "set data.labels=[pos, neg], or leave it out"),
        (["1", "0"], ["0", "1"], "set data.labels=[0, 1], or leave it out"),
        (["a", "b", "x"], ["b", "a", "c"], "set data.labels in the order of the head"),
    ],
)
def test_another_order_than_the_heads_is_refused(names, known, advice):
    with pytest.raises(errors.ConfigError, match="classification head was trained on") as e:
        labels.check_order(names, known)
    assert advice in str(e.value)


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["neg", "pos"], []),
        (["neg", "pos"], ["neg", "pos"]),
        (["neg", "pos"], ["x", "y"]),
        (["b", "x"], ["b", "a", "c"]),
        (["0", "1", "2"], ["1", "2", "3"]),
        (["a", "A"], ["a", "A"]),
    ],
)
def test_orders_that_agree_or_have_nothing_in_common(names, known):
    labels.check_order(names, known)
