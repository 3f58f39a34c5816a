"""The text that the embedded model learns from: rows that a seeded generator writes.

A row is (prompt, completion); a plain text has an empty prompt. The kinds of `heldout` never appear here.

    python experiments/embedded_model/corpus.py            # print a few rows of each kind
"""

import random
import zlib
from collections.abc import Callable, Iterator

import language
import puzzles

Row = tuple[str, str]

KINDS: dict[str, tuple[Callable[[random.Random], Row], float]] = {
    "add": (puzzles.add, 3.0),
    "subtract": (puzzles.subtract, 2.5),
    "multiply": (puzzles.multiply, 1.0),
    "bigger": (puzzles.bigger, 1.0),
    "story_sum": (puzzles.story_sum, 2.0),
    "spell": (puzzles.spell, 1.0),
    "reverse": (puzzles.reverse, 1.5),
    "reverse_list": (puzzles.reverse_list, 1.0),
    "letters": (puzzles.letters, 2.0),
    "sort": (puzzles.sort, 2.0),
    "count": (puzzles.count, 1.5),
    "member": (puzzles.member, 1.0),
    "sentiment": (language.sentiment, 2.0),
    "topic": (language.topic, 1.0),
    "kind": (language.kind, 1.0),
    "fact": (language.fact, 1.0),
    "follow": (language.follow, 0.7),
    "obey": (language.obey, 1.5),
    "lookup": (language.lookup, 1.5),
    "story": (language.story, 2.0),
}
"""Name -> (generator, how often it is drawn, relative to the others)."""

MEMORISED = ("multiply", "spell", "reverse", "kind", "fact", "follow")
"""Kinds of so few rows that all of them are learned; of the others one prompt in twenty is kept for evaluation."""


def is_held_out(name: str, row: Row) -> bool:
    """Whether a row is kept out of training, to be evaluated on: decided by its prompt alone."""
    return name not in MEMORISED and row[0] != "" and zlib.crc32(row[0].encode()) % 20 == 0


def rows(seed: int) -> Iterator[tuple[str, Row]]:
    """Endless (kind, row) for training; the same seed gives the same rows."""
    r = random.Random(seed)
    names = list(KINDS)
    weights = [KINDS[n][1] for n in names]
    while True:
        name = r.choices(names, weights)[0]
        row = KINDS[name][0](r)
        if not is_held_out(name, row):
            yield name, row


def evaluation_rows(name: str, number: int, seed: int = 1) -> list[Row]:
    """``number`` different rows of a kind that training never shows (any rows, for the memorised kinds)."""
    r = random.Random(f"{name} {seed}")
    found: dict[str, Row] = {}
    for _ in range(200 * number):
        row = KINDS[name][0](r)
        if row[0] and (name in MEMORISED or is_held_out(name, row)):
            found.setdefault(row[0], row)
        if len(found) == number:
            break
    return list(found.values())


if __name__ == "__main__":
    for name_ in KINDS:
        for prompt, completion in evaluation_rows(name_, 3):
            print(f"{name_:12} {prompt}  =>  {completion}")
