"""Exact match: generate what follows each prompt, and compare with what should."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tunejax.data.completions import left_padded

ROUND = 32
"""Prompts are padded to a multiple of this, so that few shapes are compiled."""


class Task(NamedTuple):
    """prompt: token ids; expected: text."""

    prompt: list[int]
    expected: str


class Answer(NamedTuple):
    """One row: the texts of prompt, expectation and generation, and whether they agree."""

    prompt: str
    expected: str
    generated: str
    correct: bool


def task(
    tokens: np.ndarray,
    targets: np.ndarray,
    loss_weights: np.ndarray,
    tokenizer: Any,
    stop_tokens: Sequence[int] = (),
) -> Task:
    """The prompt and the expected text of an example: what stands before its first loss-bearing run, and that run.

    Args:
      tokens, targets, loss_weights: [length], aligned: ``targets[i]`` is what position i predicts.
      tokenizer: of the model.
      stop_tokens: one of these at the end is no part of the expected text.
    """
    bearing = np.flatnonzero(loss_weights > 0)
    first = int(bearing[0])
    gaps = np.flatnonzero(np.diff(bearing) > 1)
    last = int(bearing[gaps[0]]) if len(gaps) else int(bearing[-1])
    expected = targets[first : last + (targets[last] not in stop_tokens)].tolist()
    text = tokenizer.decode(expected, skip_special_tokens=True)
    return Task(tokens[: first + 1].tolist(), text)


def answers(generate: Any, tasks: Iterable[Task], tokenizer: Any, *, batch_size: int) -> Iterator[Answer]:
    """Generates for every task, and compares.

    Args:
      generate: (tokens [batch, length] int32, attention_mask) -> for each row what is said, ids without a stop token.
      tasks: in any order; answers come in the same one.
      tokenizer: of the model.
      batch_size: rows at a time; the last batch is filled up, so that one shape serves.
    """
    tasks = list(tasks)
    longest = max((len(t.prompt) for t in tasks), default=1)
    width = -(-longest // ROUND) * ROUND
    for i in range(0, len(tasks), batch_size):
        some = tasks[i : i + batch_size]
        tokens, mask = left_padded([t.prompt for t in some] + [[0]] * (batch_size - len(some)), width)
        new = generate(tokens, mask)[: len(some)]
        for t, row in zip(some, new, strict=True):
            said = tokenizer.decode([int(x) for x in row], skip_special_tokens=True)
            prompt = tokenizer.decode(t.prompt, skip_special_tokens=True)
            yield Answer(prompt, t.expected, said, normal(said) == normal(t.expected))


def normal(text: str) -> str:
    """Text without what does not count: runs of space, and space at the ends."""
    return re.sub(r"\s+", " ", text).strip()
