"""Batches taken apart into prompts, and put together again with other completions: what a student writes, say."""

from collections.abc import Mapping, Sequence

import numpy as np


def left_padded(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, int32 [prompts, width], padding in front."""
    tokens, mask = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        if len(prompt):
            tokens[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
    return tokens, mask


def until_stop(ids: Sequence[int], stop_tokens: Sequence[int]) -> list[int]:
    """What was said: the tokens before the first of ``stop_tokens``; what follows it is padding."""
    stops = np.flatnonzero(np.isin(ids, stop_tokens))
    return [int(i) for i in ids[: stops[0] if len(stops) else None]]


def prompts(batch: Mapping[str, np.ndarray], virtual: int = 0) -> list[list[int]]:
    """Of each row, the tokens up to the first one that is in the loss, which is not among them.

    Args:
      batch: of one example a row, see `collate.collate`.
      virtual: how many tokens in front are left out. A row without a loss has an empty prompt.
    """
    found = []
    for tokens, weights in zip(batch["tokens"], batch["loss_weights"], strict=True):
        bearing = np.flatnonzero(weights)
        found.append(tokens[virtual : bearing[0] + 1].tolist() if len(bearing) else [])
    return found


def completed(
    prompts: Sequence[Sequence[int]],
    new: np.ndarray,
    length: int,
    *,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    virtual: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """A batch [rows, length] of prompts with their completions, which alone are in the loss.

    Args:
      new: [rows, n] tokens; a completion ends with the first of ``stop_tokens``. It is cut where the row is full.
      virtual: ids before each prompt.

    A row with an empty prompt is padding.
    """
    batch = {name: np.zeros((len(prompts), length), np.int32) for name in ("targets", "positions", "segment_ids")}
    batch["tokens"] = np.full((len(prompts), length), pad_id, np.int32)
    batch["loss_weights"] = np.zeros((len(prompts), length), np.float32)
    before = len(virtual)
    for r, (prompt, drawn) in enumerate(zip(prompts, new, strict=True)):
        if not prompt:
            continue
        stops = np.flatnonzero(np.isin(drawn, stop_tokens))
        ids = [*virtual, *prompt, *drawn[: stops[0] + 1 if len(stops) else None].tolist()][: length + 1]
        size = len(ids) - 1
        batch["tokens"][r, :size] = ids[:-1]
        batch["targets"][r, before:size] = ids[before + 1 :]
        batch["loss_weights"][r, before + len(prompt) - 1 : size] = 1
        batch["positions"][r, :size] = np.arange(size)
        batch["segment_ids"][r, :size] = 1
    return batch
