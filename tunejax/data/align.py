"""The rows of a student as a teacher with another tokenizer reads them, aligned by their text.

Two positions are compared where both have read the same text. Space is left out, since tokenizers put it before, after
or nowhere, and so is case, which some drop.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tunejax.core import errors
from tunejax.data import collate
from tunejax.data.example import Example, Store

PARTIAL = "\ufffd"
"""What `decode` makes of bytes that are no whole letter yet."""
UNKNOWN = "\uffff"
"""Stands for what a tokenizer does not know; no text has it."""


class Span(NamedTuple):
    """Loss-bearing positions side by side: a completion, a turn of the assistant's, or a whole text.

    at: int [n], the positions. starts: int [n], where in the row the token begins that each predicts, see `starts`.
    text: the letters of those tokens, without one that is cut at their end.
    """

    at: np.ndarray
    starts: np.ndarray
    text: str


class Read(NamedTuple):
    """A row as text. letters: of all of it, also where it is not learned."""

    letters: str
    spans: list[Span]

    @classmethod
    def of(cls, example: Example, tokenizer: Any) -> "Read":
        """What the tokenizer's ids of a row stand for. Its targets are its next tokens."""
        ids = np.append(example.tokens[:1], example.targets)
        learned = np.flatnonzero(example.loss_weights)
        spans = []
        for at in np.split(learned, np.flatnonzero(np.diff(learned) > 1) + 1):
            whole = ids[: at[-1] + 2]
            begun = starts(tokenizer, whole, int(at[0]) + 1)
            spans.append(Span(at, np.asarray(begun), _letters(tokenizer, whole).rstrip(PARTIAL)[begun[0] :]))
        return cls(_letters(tokenizer, ids), spans)


def starts(tokenizer: Any, ids: np.ndarray, first: int = 0) -> list[int]:
    """Where each of ``ids`` from the one at ``first`` on begins: how many letters the ids before it stand for.

    -1 where it begins inside a letter, of whose bytes the ids before it have some.
    """
    before = (_letters(tokenizer, ids[:i]) for i in range(first, len(ids)))
    return [-1 if text.endswith(PARTIAL) else len(text) for text in before]


def _letters(tokenizer: Any, ids: np.ndarray) -> str:
    unknown = np.flatnonzero((ids == tokenizer.unk_token_id) & _has_unknown(tokenizer))
    parts = (tokenizer.decode(part, skip_special_tokens=True) for part in np.split(ids, unknown))
    return "".join(UNKNOWN.join(parts).lower().split())


def _has_unknown(tokenizer: Any) -> bool:
    """Whether it has an id of its own for what it does not know: GPT-2 names the end of a text as that too."""
    return tokenizer.unk_token_id not in (None, tokenizer.eos_token_id)


def places(ours: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """Of each of our starts, which of theirs is the same (the first one), or -1. A start below 0 is nowhere."""
    first: dict[int, int] = {}
    for i, start in enumerate(theirs):
        first.setdefault(start, i)
    return [first.get(start, -1) if start >= 0 else -1 for start in ours]


def pairs(ours: Read, theirs: Read) -> dict[int, int]:
    """Our positions to those of theirs that have read the same text.

    That is the row's text from its beginning on, as far as the two agree. Where they differ before a span begins (by
    what their chat templates put around turns, by a word that one does not know), the span is compared by itself with
    theirs, provided that one's text begins with the other's: it may be cut, but not begin elsewhere.
    """
    common = _common(ours.letters, theirs.letters)
    begun = [[(s.at, np.where(s.starts <= common, s.starts, -1)) for s in read.spans] for read in (ours, theirs)]
    out = _met(*(tuple(map(np.concatenate, zip(*spans, strict=True))) for spans in begun))
    for a, b in zip(ours.spans, theirs.spans, strict=False):  # a row that is cut has fewer
        first = sorted((a.starts[0], b.starts[0]))
        differ = first[0] >= 0 and first[1] > common
        if differ and _common(a.text, b.text) == min(len(a.text), len(b.text)):
            out |= _met((a.at, a.starts - a.starts[0]), (b.at, b.starts - b.starts[0]))
    return out


def _common(a: str, b: str) -> int:
    """How many letters two texts have in common from their beginning on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _met(ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...]) -> dict[int, int]:
    """Positions with equal starts, of two pairs (positions, starts)."""
    found = places(ours[1].tolist(), theirs[1].tolist())
    return {int(at): int(theirs[0][i]) for at, i in zip(ours[0], found, strict=True) if i >= 0}


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
            met = pairs(*map(Read.of, (ours, theirs), self._tokenizers))
            at[list(met)] = [1 + there for there in met.values()]
        return {"teacher_at": at}

    def row(self, index: int) -> dict[str, np.ndarray]:
        """The teacher's tokens of an example and their mask, each [m]."""
        theirs = self._pair(index)[1]
        tokens = np.zeros(0, np.int32) if theirs is None else theirs.tokens
        return {"teacher_tokens": tokens, "teacher_mask": np.ones_like(tokens)}
