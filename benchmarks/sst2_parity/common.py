"""What both sides of the comparison share: rows, order, batches and hyper-parameters. Standard library and numpy."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("full", "lora", "bitfit")
LEARNING_RATE = {"full": 1e-4, "lora": 1e-3, "bitfit": 2e-3}
BATCH, MAX_LENGTH, WARMUP = 16, 64, 0.1
RANK, ALPHA = 8, 16
MAX_GRAD_NORM = 1.0
"""AdamW without decay, linear warm-up and decay, dropout 0, float32."""


def arguments() -> argparse.Namespace:
    """The flags that both sides take."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--assets", type=Path, required=True, help="folder with data/sst2")
    parser.add_argument("--start", type=Path, required=True, help="folder of the start that the torch side writes")
    return parser.parse_args()


def read(file: Path) -> tuple[list[str], np.ndarray]:
    """Sentences and labels of a TSV with a header line."""
    rows = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return [sentence for sentence, _ in rows], np.array([int(label) for _, label in rows], np.int32)


def encode(tokenizer: Any, sentences: list[str]) -> list[list[int]]:
    """Token ids of each sentence, at most `MAX_LENGTH`."""
    return tokenizer(sentences, truncation=True, max_length=MAX_LENGTH)["input_ids"]


def pad(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) int32 [rows, 32 or 64], padded with 0 on the right; few lengths, so few compilations."""
    length = 32 * -(-max(map(len, rows)) // 32)
    ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def training_batches(rows: list[list[int]], labels: np.ndarray, seed: int, steps: int) -> Iterator[tuple]:
    """(ids, mask, labels) a step, in the order that ``seed`` gives."""
    rng, order = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(rows))
        take, order = order[:BATCH], order[BATCH:]
        yield *pad([rows[i] for i in take]), labels[take]


def dev_batches(rows: list[list[int]], labels: np.ndarray) -> Iterator[tuple]:
    """(ids, mask, labels) over all rows in order."""
    for i in range(0, len(rows), 64):
        yield *pad(rows[i : i + 64]), labels[i : i + 64]


def report(side: str, args: argparse.Namespace, accuracy: float, losses: list[float]) -> None:
    """Prints one JSON line."""
    result = {"side": side, "method": args.method, "seed": args.seed, "steps": args.steps, "accuracy": accuracy}
    print(json.dumps({**result, "losses": [round(x, 5) for x in losses]}), flush=True)
