"""Rows from files, folders or a hub id, with our names for their fields."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tunejax.core import errors
from tunejax.data import bad, files
from tunejax.data.class_labels import Columns
from tunejax.data.files import Row


def read_rows(
    path: str | Path | Sequence[Mapping[str, Any]],
    rejects: bad.BadRows | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    separator: str | None = None,
    max_rows: int | None = None,
) -> list[Row]:
    """All rows of a source.

    Args:
      path: a file (see `files.read`), a glob of files, a folder that `datasets` saved or can load, a hub id
        ("owner/name", or "owner/name:config"), or rows in memory.
      rejects: takes bad lines; by default the first ones raise.
      columns: our name -> the name in the source.
      split: of a hub id or folder.
      separator: of the documents of a text file; see `files.text`.
      max_rows: stop after so many usable rows.

    Raises:
      DataError: nothing there, no rows, an unknown column, or bad lines under the policy "error".
    """
    rejects = bad.BadRows() if rejects is None else rejects
    found = list(islice(_rename(_source(path, rejects, split, separator), dict(columns or {})), max_rows))
    rejects.check()
    if not found:
        name = path if isinstance(path, str | Path) else "the list"
        raise errors.DataError(f"{name}: no rows. Skipped: {rejects.describe()}")
    return found


def _source(path: Any, rejects: bad.BadRows, split: str, separator: str | None) -> Iterator[Row]:
    if not isinstance(path, str | Path):
        return (Row(dict(fields), f"rows:{i}") for i, fields in enumerate(path, 1))
    text, local = str(path), Path(path)
    if local.is_file():
        return files.read(local, rejects, separator)
    if local.is_dir():
        return _dataset(text, split)
    if is_glob(text):
        return _glob(local, rejects, separator)
    if is_hub_id(text):
        return _dataset(text, split)
    there = [p.name for p in local.parent.iterdir()] if local.parent.is_dir() else []
    near = errors.did_you_mean(local.name, there) if there else f"There is no folder {local.parent} either."
    raise errors.DataError(f"no file at {path}. {near}")


def is_hub_id(text: str) -> bool:
    """Whether a path that is no file may be a data set of the hub: owner/name-2.5, or owner/name:subset."""
    ending = re.search(r"\.[A-Za-z]{2}\w*$", text)
    return not ending and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", text) is not None


def is_glob(text: str) -> bool:
    """Whether a path that is no file stands for several."""
    return any(c in text for c in "*?[")


def matching(pattern: Path) -> list[Path]:
    """The files of a glob, in order. Raises DataError where there are none."""
    start = Path(pattern.anchor) if pattern.is_absolute() else Path()
    relative = pattern.relative_to(pattern.anchor) if pattern.is_absolute() else pattern
    paths = sorted(p for p in start.glob(str(relative)) if p.is_file())
    if not paths:
        raise errors.DataError(f"no file matches {pattern}")
    return paths


def _glob(pattern: Path, rejects: bad.BadRows, separator: str | None) -> Iterator[Row]:
    for p in matching(pattern):
        yield from files.read(p, rejects, separator)


def _dataset(name: str, split: str) -> Iterator[Row]:
    """Rows through `datasets`; its code-running loaders do not exist any more, so nothing of the source runs."""
    import datasets

    repo, _, config = name.partition(":") if not Path(name).is_dir() else (name, "", "")
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(repo, config or None, split=split)
    except Exception as e:  # what a missing network, split or permission raises has no common class
        raise errors.DataError(
            f"{name} (split {split!r}): neither a local file nor loadable as a data set: {_first_line(e)}"
        ) from None
    columns = Columns({k: f.names for k, f in data.features.items() if isinstance(f, datasets.ClassLabel)})
    for number, fields in enumerate(data, 1):
        yield Row(columns.named(fields), f"{name}[{split}]:{number}")


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def _rename(found: Iterator[Row], columns: dict[str, str]) -> Iterator[Row]:
    """Rows under our names; a renamed field replaces one that already has our name."""
    if not columns:
        yield from found
        return
    theirs = set(columns.values())
    for number, row in enumerate(found):
        if number == 0 and not theirs <= set(row.fields):
            _refuse(row, columns)
        kept = {k: v for k, v in row.fields.items() if k not in theirs and k not in columns}
        yield Row({**kept, **{our: row.fields[t] for our, t in columns.items() if t in row.fields}}, row.source)


def _refuse(row: Row, columns: dict[str, str]) -> None:
    for our, their in columns.items():
        if their not in row.fields:
            raise errors.DataError(
                f"{row.source}: data.columns says that {our!r} is in the column {their!r}, which is not there. "
                f"{errors.did_you_mean(their, row.fields)} The row has: {', '.join(row.fields)}."
            )
