"""Columns of classes in a data set (`ClassLabel` of the library `datasets`): numbers in its files, names in rows."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

METADATA = b"huggingface"
"""Under what `datasets` notes its columns in a Parquet file."""


class ClassName(str):
    """A class of a data set, as the text of its name.

    number: as the data set has it; names: of all its classes, in order. A number that is none of theirs, such as the -1
    of rows without a label, has the name "".
    """

    number: int
    names: tuple[str, ...]

    def __new__(cls, number: int, names: tuple[str, ...]) -> "ClassName":
        """The class of that number."""
        made = super().__new__(cls, names[number] if 0 <= number < len(names) else "")
        made.number, made.names = number, names
        return made

    @property
    def labelled(self) -> bool:
        """Whether it is a class at all."""
        return 0 <= self.number < len(self.names)


class Columns:
    """The columns of classes of a data set, by name."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._names = {k: tuple(map(str, names)) for k, names in columns.items()}
        # Rows share the objects: a million of them have few classes.
        self._made = {k: [ClassName(i, names) for i in range(len(names))] for k, names in self._names.items()}

    def named(self, fields: dict[str, Any]) -> dict[str, Any]:
        """``fields`` with the numbers of these columns as `ClassName`s."""
        return {**fields, **{k: self._class(k, fields[k]) for k in self._names if isinstance(fields.get(k), int)}}

    def _class(self, column: str, number: int) -> ClassName:
        made = self._made[column]
        return made[number] if 0 <= number < len(made) else ClassName(number, self._names[column])


def in_parquet(metadata: Mapping[bytes, bytes] | None) -> Columns:
    """The columns of classes that `datasets` noted in the metadata of a Parquet file's schema, if it did."""
    try:
        features = json.loads((metadata or {})[METADATA])["info"]["features"]
        found = {k: f["names"] for k, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError):
        return Columns({})
    return Columns(found)
