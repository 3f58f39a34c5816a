"""A teacher's likeliest tokens at every loss-bearing position, on disk: written once, read example by example.

A folder of Parquet files, one row an example in the order of the corpus, and a manifest that says what they belong to.
Row groups are small, so that reading one example in a shuffled order touches little else, and nothing stays in memory.
"""

import collections
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunejax.core import errors
from tunejax.data.example import Example, Store

FORMAT, MANIFEST = 1, "manifest.json"
GROUP, PART = 1 << 16, 1 << 21
"""Entries (positions times k) of a row group and of a file. A killed writer loses a file's worth of work at most."""
KEPT = 8
"""Row groups that stay decoded."""


class Manifest(NamedTuple):
    """What a cache belongs to.

    teacher, teacher_digest: its name and the digest of its parameters. temperature: of the log-probabilities.
    k: how many a position; vocabulary: out of how many. data: `Store.digest` of the examples; tokenizer: its digest.
    """

    teacher: str
    teacher_digest: str
    temperature: float
    k: int
    vocabulary: int
    data: str
    tokenizer: str
    max_length: int
    examples: int
    positions: int


class Rows(NamedTuple):
    """Of the n loss-bearing positions of one example, in order.

    ids int32 [n, k], the likeliest first; logprobs float32 [n, k]; tail float32 [n], the log of all the others' mass.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray


class Layout(NamedTuple):
    """Where each example lies, all int64 [examples]: its file, its row group in that file, its row in that group."""

    part: np.ndarray
    group: np.ndarray
    row: np.ndarray

    @property
    def parts(self) -> int:
        """How many files there are."""
        return int(self.part[-1]) + 1

    def examples(self, part: int) -> np.ndarray:
        """Indices of the examples of a file."""
        return np.flatnonzero(self.part == part)


def positions(store: Store) -> np.ndarray:
    """Loss-bearing positions of each example, int64 [examples]."""
    return np.add.reduceat((store.loss_weights != 0).astype(np.int64), store.starts[:-1])


def layout(counts: np.ndarray, k: int) -> Layout:
    """The layout of examples with so many positions: it follows from these alone, so a resumed writer agrees."""
    start = (np.cumsum(counts) - counts) * k
    part = np.unique(start // PART, return_inverse=True)[1]
    whole = np.unique(start // GROUP, return_inverse=True)[1]
    first = np.flatnonzero(np.diff(whole, prepend=-1))
    opens = np.flatnonzero(np.diff(part, prepend=-1))
    return Layout(part, whole - whole[opens][part], np.arange(len(counts)) - first[whole])


def key(example: Example, rows: Rows) -> str:
    """A digest of what was said, and of what of the example it depends on: damage and other data both change it."""
    h = hashlib.blake2b(digest_size=8)
    for a in (example.tokens, example.loss_weights != 0, example.token_types, *rows):
        if a is not None:
            h.update(np.ascontiguousarray(a).data)
    return h.hexdigest()


def begin(folder: Path, manifest: Manifest) -> None:
    """Makes the folder, or sees that what is in it is the same cache.

    Raises:
      ConfigError: it holds something else.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise errors.ConfigError(f"{folder} is there and is no teacher's cache (it has no {MANIFEST})")
    if (folder / MANIFEST).is_file():
        there, now = read_manifest(folder)._asdict(), manifest._asdict()
        changed = [f"{k}: {there[k]} there, {now[k]} now" for k in now if there[k] != now[k]]
        if changed:
            raise errors.ConfigError(f"{folder} holds another cache: {'; '.join(changed)}. Name another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f".{MANIFEST}.{os.getpid()}"
    half.write_text(json.dumps({"format": FORMAT, **manifest._asdict()}, indent=2) + "\n", encoding="utf-8")
    half.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Raises ConfigError where there is none, CheckpointError where it is damaged or of a later format."""
    if not (folder / MANIFEST).is_file():
        raise errors.ConfigError(
            f"{folder} is no teacher's cache (it has no {MANIFEST}): tunejax distill-cache makes one"
        )
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if raw.pop("format") != FORMAT:
            raise errors.CheckpointError(f"{folder / MANIFEST} is of a later format than {FORMAT}")
        return Manifest(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise errors.CheckpointError(f"{folder / MANIFEST} is damaged: {e}") from None


def missing(folder: Path, parts: int) -> list[int]:
    """The files that are still to be written."""
    return [p for p in range(parts) if not _file(folder, p).is_file()]


def write_part(folder: Path, store: Store, where: Layout, part: int, rows: Mapping[int, Rows]) -> None:
    """Writes one file, whole or not at all. rows: of each of its examples, by index."""
    import pyarrow as pa
    from pyarrow import parquet

    half = folder / f".{_file(folder, part).name}.{os.getpid()}"
    inside = where.examples(part)
    with parquet.ParquetWriter(half, _schema(), compression="zstd", use_dictionary=False) as writer:
        for group in np.unique(where.group[inside]):
            chosen = [int(i) for i in inside[where.group[inside] == group]]
            columns = {
                "index": chosen,
                "key": [key(store[i], rows[i]) for i in chosen],
                **{n: [getattr(rows[i], n).reshape(-1) for i in chosen] for n in Rows._fields},
            }
            writer.write_table(pa.table(columns, schema=_schema()))
    half.replace(_file(folder, part))


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {"index": pa.int64(), "key": pa.string(), "ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32()),
         "tail": pa.list_(pa.float32())}
    )  # fmt: skip


def _file(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.parquet"


class Cache:
    """A finished cache, as a `collate.Beside`: the rows of an example at its own positions.

    shapes: teacher_ids int32 [k], teacher_logprobs float32 [k], teacher_tail float32 [] of each position.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        *,
        vocabulary: int,
        temperature: float,
        tokenizer: str,
        teacher: str | None = None,
    ) -> None:
        """Opens it for the examples of ``store``. teacher: the name of whom it is expected to be of; None: of anyone.

        Raises:
          ConfigError: no cache, an unfinished one, or one of another teacher, temperature, vocabulary or data.
        """
        self.manifest = read_manifest(folder)
        _check(folder, self.manifest, store, vocabulary, temperature, tokenizer, teacher)
        self._folder, self._store = folder, store
        self._where = layout(positions(store), self.manifest.k)
        absent = missing(folder, self._where.parts)
        if absent:
            raise errors.ConfigError(
                f"distill.cache {folder} is not finished ({len(absent)} of {self._where.parts} files are missing): "
                "run tunejax distill-cache again, it goes on"
            )
        k = (self.manifest.k,)
        self.shapes: Mapping[str, tuple[tuple[int, ...], Any]] = {
            "teacher_ids": (k, np.int32),
            "teacher_logprobs": (k, np.float32),
            "teacher_tail": ((), np.float32),
        }
        self.rows: Mapping[str, tuple[int, Any]] = {}
        self.digest = hashlib.blake2b(repr(self.manifest).encode(), digest_size=8).hexdigest()
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._groups: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()

    def said(self, index: int) -> Rows:
        """What the teacher said at the loss-bearing positions of an example. Raises CheckpointError: damaged."""
        part, group, row = (int(x[index]) for x in self._where)
        with self._lock:  # a Parquet reader is not for several threads
            table = _kept(self._groups, (part, group), lambda: self._read(part, group))
        n = int((self._store[index].loss_weights != 0).sum())
        sizes = {"ids": (n, self.manifest.k), "logprobs": (n, self.manifest.k), "tail": (n,)}
        try:
            at, signed = table["index"][row].as_py(), table["key"][row].as_py()
            rows = Rows(**{name: table[name][row].values.to_numpy().reshape(size) for name, size in sizes.items()})
        except (ValueError, IndexError, AttributeError):  # lists of another length, fewer rows, a null
            at = signed = rows = None
        if rows is None or at != index or signed != key(self._store[index], rows):
            raise errors.CheckpointError(f"{_file(self._folder, part)} is damaged: example {index} is not as it was")
        return rows

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        """Arrays by name, each [n, ...] for the n positions of the example; 0 where nothing is learned."""
        found, weights = self.said(index), self._store[index].loss_weights
        at, out = np.flatnonzero(weights), {}
        for (name, (shape, dtype)), values in zip(self.shapes.items(), found, strict=True):
            out[name] = np.zeros((len(weights), *shape), dtype)
            out[name][at] = values
        return out

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Nothing belongs to a whole row."""
        return {}

    def _read(self, part: int, group: int) -> Any:
        import pyarrow as pa

        path = _file(self._folder, part)
        try:
            table = _kept(self._files, part, lambda: _opened(path)).read_row_group(group).combine_chunks()
            table.validate(full=True)
            return table
        except (pa.ArrowException, OSError, ValueError, MemoryError) as e:
            raise errors.CheckpointError(f"{path} is damaged: {str(e).splitlines()[0]}") from None


def _opened(path: Path) -> Any:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    if not file.schema_arrow.equals(_schema()):
        raise ValueError("its columns are not a cache's")
    return file


def _kept(held: collections.OrderedDict, name: Any, make: Any) -> Any:
    """``held[name]``, made where it is not there; the one that was used longest ago goes."""
    if name not in held:
        held[name] = make()
        if len(held) > KEPT:
            held.popitem(last=False)
    held.move_to_end(name)
    return held[name]


def _check(
    folder: Path,
    found: Manifest,
    store: Store,
    vocabulary: int,
    temperature: float,
    tokenizer: str,
    teacher: str | None,
) -> None:
    problems = []
    if teacher not in (None, found.teacher):
        problems.append(f"its teacher is {found.teacher}, and distill.teacher is {teacher}")
    if found.temperature != temperature:
        problems.append(f"it was made at temperature {found.temperature:g}, and distill.temperature is {temperature:g}")
    if found.vocabulary != vocabulary:
        problems.append(f"its teacher tells {found.vocabulary} tokens or labels apart, and the student {vocabulary}")
    if found.data != store.digest:
        other = "by another tokenizer" if found.tokenizer != tokenizer else "of other rows or options of data"
        problems.append(
            f"it was made {other} ({found.examples} examples at max_length {found.max_length}; now {len(store)} that "
            "differ from them)"
        )
    if problems:
        raise errors.ConfigError(f"distill.cache {folder} does not fit this run: {'; '.join(problems)}")
