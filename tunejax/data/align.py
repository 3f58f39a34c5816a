"""The rows of a student as a teacher with another tokenizer reads them, aligned by their text.

Two positions are compared where the tokens that they predict begin at the same character: both have then read the same
text. Space is left out of the count, since tokenizers put it before, after or nowhere.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tunejax.core import errors
from tunejax.data import collate
from tunejax.data.example import Example, Store


def starts(tokenizer: Any, ids: np.ndarray) -> list[int]:
    """Where each of ``ids`` begins: how many characters, space aside, the ids before it stand for."""
    return [_letters(tokenizer.decode(ids[:i], skip_special_tokens=True)) for i in range(len(ids))]


def _letters(text: str) -> int:
    return len("".join(text.split()))


def places(ours: list[int], theirs: list[int]) -> list[int]:
    """Of each of our starts, which of theirs is the same (the first one), or -1."""
    first: dict[int, int] = {}
    for i, start in enumerate(theirs):
        first.setdefault(start, i)
    return [first.get(start, -1) for start in ours]


class Aligned:
    """What the teacher reads beside each row of the student's, as a `collate.Beside` of one example a row.

    shapes: teacher_at int32, 1 + the teacher's position that predicts from the same text on, or 0 where there is none.
    rows: teacher_tokens and teacher_mask int32 of the teacher's whole row.
    """

    def __init__(self, ours: Store, theirs: Store, our_tokenizer: Any, their_tokenizer: Any) -> None:
        """Pairs the examples by the rows that they come from; one without a partner has no positions in common.

        Raises:
          ConfigError: several examples come from one row.
        """
        for store in (ours, theirs):
            if len(set(store.sources)) < len(store):
                raise errors.ConfigError(
                    "rows that are cut into several examples cannot be aligned with another tokenizer's: "
                    "set data.truncation to something else than split"
                )
        self._ours, self._theirs = ours, theirs
        self._tokenizers = our_tokenizer, their_tokenizer
        self._partner = {source: i for i, source in enumerate(theirs.sources)}
        longest = int(theirs.lengths.max(initial=1))
        size = collate.bucket(longest, collate.default_buckets(-(-longest // 32) * 32))
        self.shapes: Mapping[str, tuple[tuple[int, ...], Any]] = {"teacher_at": ((), np.int32)}
        self.rows: Mapping[str, tuple[int, Any]] = dict.fromkeys(("teacher_tokens", "teacher_mask"), (size, np.int32))
        self.digest = f"{ours.digest}-{theirs.digest}"

    def _pair(self, index: int) -> tuple[Example, Example | None]:
        ours = self._ours[index]
        partner = self._partner.get(ours.source)
        return ours, None if partner is None else self._theirs[partner]

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        """teacher_at [n] of the n positions of an example of the student's."""
        ours, theirs = self._pair(index)
        at = np.zeros(len(ours.tokens), np.int32)
        if theirs is not None:
            mine, other = (np.flatnonzero(e.loss_weights) for e in (ours, theirs))
            begun = starts(self._tokenizers[0], ours.targets[mine]), starts(self._tokenizers[1], theirs.targets[other])
            found = np.asarray(places(*begun))
            at[mine] = np.where(found < 0, 0, 1 + other[found])
        return {"teacher_at": at}

    def row(self, index: int) -> dict[str, np.ndarray]:
        """The teacher's tokens of an example and their mask, each [m]."""
        theirs = self._pair(index)[1]
        tokens = np.zeros(0, np.int32) if theirs is None else theirs.tokens
        return {"teacher_tokens": tokens, "teacher_mask": np.ones_like(tokens)}
