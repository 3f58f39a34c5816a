"""Rows of every kind of file, each with its line, and what is said of bad ones."""

import csv
import gzip
import json

import pytest
import toys

from tunejax.core import errors
from tunejax.data import bad, rows

ROWS = [{"text": "one", "n": "1"}, {"text": 'two "quoted"\nlines', "n": "2"}, {"text": "thrée", "n": "3"}]


def _fields(found):
    return [r.fields for r in found]


def _lines(found):
    return [int(r.source.rsplit(":", 1)[1]) for r in found]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".ndjson"])
def test_json_lines(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    raw = "\ufeff" + json.dumps(ROWS[0]) + "\n\n" + "\r\n".join(json.dumps(r) for r in ROWS[1:])
    path.write_bytes(gzip.compress(raw.encode()) if ending.endswith("gz") else raw.encode())
    found = rows.read_rows(path)
    assert (_fields(found), _lines(found)) == (ROWS, [1, 3, 4])


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: {"note": [1], "data": r}, lambda r: {"a": {"b": []}, "z": r}])
def test_json(tmp_path, wrap):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(wrap(ROWS), indent=1))
    found = rows.read_rows(path)
    text = path.read_text().splitlines()
    assert _fields(found) == ROWS
    for row in found:
        line = int(row.source.rsplit(":", 1)[1])
        assert text[line - 1].strip() == "{"
        assert json.dumps(row.fields["text"]) in text[line]


@pytest.mark.parametrize(("ending", "dialect"), [(".csv", "excel"), (".csv.gz", "excel")])
def test_csv(tmp_path, ending, dialect):
    path = tmp_path / f"x{ending}"
    opener = gzip.open if ending.endswith("gz") else open
    with opener(path, "wt", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["text", "n"], dialect=dialect)
        writer.writeheader()
        writer.writerows(ROWS)
    found = rows.read_rows(path)
    assert (_fields(found), _lines(found)) == (ROWS, [2, 3, 5])


def test_tsv_takes_quotes_as_they_are(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('sentence\tlabel\n"half a quote\t1\nplain\t0\n')
    found = rows.read_rows(path, columns={"text": "sentence"})
    assert _fields(found) == [{"label": "1", "text": '"half a quote'}, {"label": "0", "text": "plain"}]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    found = rows.read_rows(tmp_path / "x.parquet")
    assert (_fields(found), _lines(found)) == (ROWS, [1, 2, 3])
    (tmp_path / "y.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(errors.DataError, match=r"y\.parquet: not a readable Parquet file"):
        rows.read_rows(tmp_path / "y.parquet")


@pytest.mark.parametrize(
    ("text", "separator", "expected", "lines"),
    [
        ("a\nb\n<|endoftext|>\n\nc\n", None, ["a\nb", "c"], [1, 5]),
        ("a\nb\n\n\nc\n", None, ["a\nb", "c"], [1, 5]),
        ("a\n\nb\n---\nc", "---", ["a\n\nb", "c"], [1, 5]),
        ("a\n\nb\n", "\n", ["a", "b"], [1, 3]),
        ("a\n\nb\n", "", ["a\n\nb"], [1]),
    ],
)
def test_text(tmp_path, text, separator, expected, lines):
    (tmp_path / "x.txt").write_text(text)
    found = rows.read_rows(tmp_path / "x.txt", separator=separator)
    assert ([r.fields["text"] for r in found], _lines(found)) == (expected, lines)


def test_memory_glob_and_max_rows(tmp_path):
    assert rows.read_rows(ROWS)[2] == (ROWS[2], "rows:3")
    for name in ("b", "a"):
        toys.write(tmp_path / f"{name}.jsonl", [{"text": name}] * 2)
    assert [r.fields["text"] for r in rows.read_rows(str(tmp_path / "*.jsonl"), max_rows=3)] == ["a", "a", "b"]


@pytest.mark.filterwarnings("ignore")
def test_datasets_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}], features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    found = rows.read_rows(tmp_path / "saved")
    assert _fields(found) == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert found[1].source == f"{tmp_path / 'saved'}[train]:2"
    with pytest.raises(errors.DataError, match="split 'dev'"):
        rows.read_rows(tmp_path / "saved", split="dev")
    (tmp_path / "plain").mkdir()
    toys.write(tmp_path / "plain" / "train.jsonl", [{"text": "c"}])
    assert _fields(rows.read_rows(tmp_path / "plain")) == [{"text": "c"}]
    with pytest.raises(errors.DataError, match=r"nobody/nothing \(split 'train'\): neither a local file nor"):
        rows.read_rows("nobody/nothing")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or data)
    assert len(rows.read_rows("owner/name:part", split="test")) == 2
    assert asked == [(("owner/name", "part"), {"split": "test"})]


BAD_LINES = [
    (b'{"text": "a"', bad.MALFORMED, "malformed JSON"),
    (b'{"text": "\xff\xfe"}', bad.ENCODING, r"invalid UTF-8 at byte 10 of the line \(ff fe 22 7d\)"),
    (b'["a"]', bad.TYPE, r"expected an object, found list \['a'\]"),
    (b"null", bad.TYPE, "expected an object, found null"),
    (rb'{"text": "a \ud83d b"}', bad.ENCODING, r"\\ud83d is half of a surrogate pair"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_bad_lines(tmp_path, line, reason, message):
    path = toys.write(tmp_path / "x.jsonl", [{"text": "a"}, line, {"text": "b"}])
    with pytest.raises(errors.DataError, match=rf"x\.jsonl:2: .*{message}"):
        rows.read_rows(path)
    rejects = bad.BadRows("skip")
    assert [r.fields["text"] for r in rows.read_rows(path, rejects)] == ["a", "b"]
    assert rejects.skipped == {reason: 1}
    assert rejects.samples[reason][0].startswith(f"{path}:2: ")


def test_whole_surrogate_pairs_are_text(tmp_path):
    path = toys.write(tmp_path / "x.jsonl", [rb'{"text": "\ud83d\ude00"}'])
    assert _fields(rows.read_rows(path)) == [{"text": "\U0001f600"}]


def test_bad_table_rows(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'a,b\n1,2\n1,2,3\n\n"x\ny",2\n"z\n\xff",2\n3,4\n')
    rejects = bad.BadRows("skip")
    found = rows.read_rows(path, rejects)
    assert [(r.fields["a"], r.source[-2:]) for r in found] == [("1", ":2"), ("x\ny", ":5"), ("3", ":9")]
    assert rejects.skipped == {bad.MALFORMED: 1, bad.ENCODING: 1}
    assert "x.csv:3: malformed row: expected 2 fields (a, b), found 3" in rejects.samples[bad.MALFORMED][0]
    assert "x.csv:8: invalid UTF-8" in rejects.samples[bad.ENCODING][0]
    path.write_bytes(b'a,b\n1,2\n"open,2\n')
    with pytest.raises(errors.DataError, match=r"x\.csv:3: malformed row"):
        rows.read_rows(path)
    path.write_bytes(b"a,\xff\n1,2\n")
    with pytest.raises(errors.DataError, match=r"x\.csv:1: invalid UTF-8 in the header"):
        rows.read_rows(path, bad.BadRows("skip"))
    path.write_bytes(b"a,a\n1,2\n")
    with pytest.raises(errors.DataError, match=r"x\.csv:1: the header names a twice"):
        rows.read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"a": 1},\n{"a" 2}]', r"x\.json:2: malformed JSON.*name the file \.jsonl"),
        ("x.json", b'[{"a": 1},\n"\xff"]', r"x\.json:2: invalid UTF-8"),
        ("x.json", b'{"a": 1}', "found an object with a"),
        ("x.json", b"3", r"expected a list of objects, found number 3"),
        ("x.json", b'[{"a": "b"},\n{"a": "\\uDE00"}]', r"x\.json:2: \\ude00 is half"),
        ("x.json", b"[1]", r"x\.json:1: wrong type: expected an object, found number 1"),
        ("x.jsonl", b"", "no rows"),
        ("x.jsonl.gz", b"not gzip", "damaged gzip"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:10] + b"\xff" * 20, "damaged gzip"),
        ("x.jsonl", b"[" * 100_000, "nested too deep"),
        ("x.xlsx", b"", r"no reader for files ending in '\.xlsx'"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.DataError, match=message):
        rows.read_rows(tmp_path / name)


def test_missing_file_and_column(tmp_path):
    path = toys.write(tmp_path / "train.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(errors.DataError, match=r"no file at .*trian\.jsonl\. Did you mean 'train\.jsonl'"):
        rows.read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(errors.DataError, match="no file matches"):
        rows.read_rows(str(tmp_path / "*.csv"))
    with pytest.raises(errors.DataError, match=r"train\.jsonl:1: .*'questoin'.*Did you mean 'question'"):
        rows.read_rows(path, columns={"prompt": "questoin"})


def test_errors_are_listed_together(tmp_path):
    path = toys.write(tmp_path / "x.jsonl", ["{"] * 12)
    with pytest.raises(errors.DataError, match=r"12 bad rows(\n.*)+jsonl:10: (.*\n)+.*and 2 more\n.*on_bad_row=skip"):
        rows.read_rows(path)
    with pytest.raises(errors.ConfigError, match="Did you mean 'skip'"):
        bad.BadRows("skp")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("imdb", True),
        ("owner/name-2.5", True),
        ("owner/name.v2:main", True),
        ("train.jsonl", False),
        ("data/train.xlsx", False),
        ("./name", False),
        ("../name", False),
        ("/data/name", False),
        ("a/b/c", False),
    ],
)
def test_what_may_be_a_hub_id(text, expected):
    assert rows.is_hub_id(text) == expected
