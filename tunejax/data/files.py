"""Rows of one local file, lazily, each with its line. One reader a format; bad lines go to the collector."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tunejax.core import errors
from tunejax.data import bad, class_labels


class Row(NamedTuple):
    """The fields of a row and where it stands ("file:line")."""

    fields: dict[str, Any]
    source: str


Reader = Callable[[Path, bad.BadRows, str | None], Iterator[Row]]
DOCUMENT_MARK = "<|endoftext|>"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape in JSON of half a character."""
JSON_LISTS = ("data", "rows", "examples", "instances", "train")


def read(path: Path, rejects: bad.BadRows, separator: str | None = None) -> Iterator[Row]:
    """The rows of a file, by its ending (.gz may follow): .jsonl .ndjson .json .csv .tsv .parquet .txt.

    Args:
      rejects: takes lines that are no rows.
      separator: of the documents of a .txt file; see `text`.

    Raises:
      DataError: no reader for that ending, or a file damaged as a whole.
    """
    name = path.name.removesuffix(".gz")
    ending = Path(name).suffix.lower()
    if ending not in READERS:
        raise errors.DataError(
            f"{path}: no reader for files ending in {ending or 'nothing'!r}. "
            f"{errors.did_you_mean(ending, READERS)} Each may end in .gz but .parquet."
        )
    yield from READERS[ending](path, rejects, separator)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, its bytes without the end of line). A byte order mark is dropped."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as f:
            for number, line in enumerate(f, 1):
                yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise errors.DataError(f"{path}: damaged gzip file ({e})") from None
    except OSError as e:
        raise errors.DataError(f"{path}: cannot be read ({e.strerror or e})") from None


def _decode(path: Path, number: int, line: bytes, rejects: bad.BadRows) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as e:
        found = line[e.start : e.start + 4].hex(" ")
        rejects.add(bad.ENCODING, f"{path}:{number}", f"invalid UTF-8 at byte {e.start} of the line ({found})")
        return None


def jsonl(path: Path, rejects: bad.BadRows, separator: str | None = None) -> Iterator[Row]:
    """One JSON object a line; blank lines are passed over."""
    for number, raw in _lines(path):
        if not raw.strip() or (line := _decode(path, number, raw, rejects)) is None:
            continue
        source = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as e:
            at = f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
            rejects.add(bad.MALFORMED, source, f"malformed JSON ({at}). Expected one object a line")
            continue
        except RecursionError:
            rejects.add(bad.MALFORMED, source, "malformed JSON (nested too deep). Expected one object a line")
            continue
        if _usable(value, _escapes(line), source, rejects):
            yield Row(value, source)


def _escapes(text: str) -> bool:
    """Whether JSON has the escape of half a character; nearly no text does."""
    return SURROGATE.search(text) is not None


def _usable(value: Any, escaped: bool, source: str, rejects: bad.BadRows) -> bool:
    """Whether a JSON value is a row: an object whose strings are text. escaped: as `_escapes`, of what it stood in."""
    if not isinstance(value, dict):
        rejects.add(bad.TYPE, source, f"wrong type: expected an object, found {bad.kind(value)}")
        return False
    if not escaped:
        return True
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        rejects.add(bad.ENCODING, source, f"{half} is half of a surrogate pair, which is no character; expected both")
        return False
    return True


def _whole(path: Path) -> str:
    raw = b"\n".join(line for _, line in _lines(path))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise errors.DataError(f"{path}:{line}: invalid UTF-8, so the file is not JSON") from None


def json_list(path: Path, rejects: bad.BadRows, separator: str | None = None) -> Iterator[Row]:
    """A list of objects, or an object with one such list (by the names in `JSON_LISTS` where it has several)."""
    text = _whole(path)
    try:
        value = json.loads(text)
    except ValueError as e:
        line = getattr(e, "lineno", 1)
        raise errors.DataError(
            f"{path}:{line}: malformed JSON ({e}). If each line is an object, name the file .jsonl"
        ) from None
    start = 0
    if isinstance(value, dict):
        start, value = _inner_list(path, text, value)
    if not isinstance(value, list):
        raise errors.DataError(f"{path}: expected a list of objects, found {bad.kind(value)}")
    escaped = _escapes(text)
    for item, number in zip(value, _element_lines(text, start), strict=True):
        if _usable(item, escaped, f"{path}:{number}", rejects):
            yield Row(item, f"{path}:{number}")


def _inner_list(path: Path, text: str, value: dict[str, Any]) -> tuple[int, list[Any]]:
    lists = [k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    named = [k for k in lists if k.lower() in JSON_LISTS]
    chosen = lists if len(lists) == 1 else named
    if len(chosen) != 1:
        found = ", ".join(lists or value) or "no keys"
        raise errors.DataError(
            f"{path}: expected a list of objects, or an object with one under one of {', '.join(JSON_LISTS)}; "
            f"found an object with {found}"
        )
    return _key_position(text, chosen[0]), value[chosen[0]]


def _key_position(text: str, key: str) -> int:
    """Where the value of a key of the outermost object begins. The text is known to be valid JSON."""
    decoder, at = json.JSONDecoder(), text.index("{") + 1
    while True:
        name, at = decoder.raw_decode(text, _after_space(text, at))
        at = _after_space(text, _after_space(text, at) + 1)
        if name == key:
            return at
        at = _after_space(text, decoder.raw_decode(text, at)[1]) + 1


def _element_lines(text: str, at: int) -> Iterator[int]:
    """The line on which each element of the list that begins at or after ``at`` begins."""
    decoder = json.JSONDecoder()
    at = _after_space(text, text.index("[", at) + 1)
    line, counted = 1, 0
    while text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        yield line
        at = _after_space(text, decoder.raw_decode(text, at)[1])
        at = _after_space(text, at + 1) if text[at] == "," else at


def _after_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def csv_table(path: Path, rejects: bad.BadRows, separator: str | None = None) -> Iterator[Row]:
    """A header line, then fields apart by commas, quoted as spreadsheets do."""
    yield from _table(path, rejects, {"delimiter": ",", "strict": True})


def tsv_table(path: Path, rejects: bad.BadRows, separator: str | None = None) -> Iterator[Row]:
    """A header line, then fields apart by tabs; quotes are plain characters, as in GLUE."""
    yield from _table(path, rejects, {"delimiter": "\t", "quoting": csv.QUOTE_NONE})


def _table(path: Path, rejects: bad.BadRows, dialect: dict[str, Any]) -> Iterator[Row]:
    broken: set[int] = set()

    def decoded() -> Iterator[str]:
        for number, raw in _lines(path):
            line = _decode(path, number, raw, rejects)
            if line is None:
                broken.add(number)
                line = raw.decode("utf-8", "replace")  # its quotes still bound the row
            yield line + "\n"

    csv.field_size_limit(1 << 30)
    reader = csv.reader(decoded(), **dialect)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as e:
            rejects.add(bad.MALFORMED, f"{path}:{first}", f"malformed row ({e})")
            continue
        if cells is None:
            return
        if header is None and broken:
            raise errors.DataError(f"{path}:{min(broken)}: invalid UTF-8 in the header line")
        if not cells or any(n in broken for n in range(first, reader.line_num + 1)):
            continue
        if header is None:
            header = _header(path, cells)
        elif len(cells) != len(header):
            rejects.add(
                bad.MALFORMED,
                f"{path}:{first}",
                f"malformed row: expected {len(header)} fields ({', '.join(header)}), found {len(cells)}",
            )
        else:
            yield Row(dict(zip(header, cells, strict=True)), f"{path}:{first}")


def _header(path: Path, cells: list[str]) -> list[str]:
    twice = sorted({c for c in cells if cells.count(c) > 1})
    if twice:
        raise errors.DataError(f"{path}:1: the header names {', '.join(twice)} twice")
    return cells


def text(path: Path, rejects: bad.BadRows, separator: str | None = None) -> Iterator[Row]:
    r"""Documents, as rows with the field "text"; a document's line is where it begins.

    ``separator`` "\n" makes every line a document, "\n\n" every paragraph, "" the whole file; any other string
    separates documents where a line is that string. None: lines `DOCUMENT_MARK` where the file has one, otherwise
    blank lines. A document with an invalid line is bad as a whole.
    """
    lines = [(n, _decode(path, n, raw, rejects)) for n, raw in _lines(path)]
    if separator is None:
        separator = DOCUMENT_MARK if any(line and line.strip() == DOCUMENT_MARK for _, line in lines) else "\n\n"
    held: list[tuple[int, str | None]] = []
    for number, line in [*lines, (0, None)]:
        at_end = number == 0 or (separator != "" and line is not None and line.strip() == separator.strip())
        if not at_end and (line != "" or held):
            held.append((number, line))
        if held and (at_end or separator == "\n"):
            if all(part is not None for _, part in held):
                yield Row({"text": "\n".join(str(p) for _, p in held).rstrip("\n")}, f"{path}:{held[0][0]}")
            held = []


def parquet(path: Path, rejects: bad.BadRows, separator: str | None = None) -> Iterator[Row]:
    """The rows of a Parquet file; the line is the row's number from 1. Columns of classes have their names."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = class_labels.in_parquet(table.schema_arrow.metadata)
        number = 0
        for batch in table.iter_batches(1024):
            for fields in batch.to_pylist():
                number += 1
                yield Row(columns.named(fields), f"{path}:{number}")
    except (pyarrow.ArrowException, OSError) as e:
        raise errors.DataError(f"{path}: not a readable Parquet file ({e})") from None


READERS: dict[str, Reader] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": json_list,
    ".csv": csv_table,
    ".tsv": tsv_table,
    ".txt": text,
    ".parquet": parquet,
}
