"""What both sides share: rows of real stories, their order and the hyper-parameters. Standard library and numpy."""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

BATCH, LENGTH, STEPS = 8, 256, 100
RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-3
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""LoRA on all seven projections, AdamW without decay, constant rate, float32."""


def arguments() -> argparse.Namespace:
    """The flags that both sides take."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--assets", type=Path, required=True, help="folder with models/stories260k and the stories")
    parser.add_argument("--adapter", type=Path, required=True, help="the initial A of each site, .npz")
    return parser.parse_args()


def batches(tokenizer: Any, assets: Path, steps: int) -> np.ndarray:
    """int32 [steps, BATCH, LENGTH + 1]: one story a row from its start, -1 after its end; the file's order."""
    with gzip.open(assets / "data/tinystories_sample/train.txt.gz", "rt", encoding="utf-8", newline="\n") as f:
        stories = [s.strip() for s in f.read().split("<|endoftext|>") if s.strip()][: steps * BATCH]
    out = np.full((steps * BATCH, LENGTH + 1), -1, np.int32)
    for row, ids in zip(out, tokenizer(stories)["input_ids"], strict=True):
        row[: len(ids)] = ids[: LENGTH + 1]
    return out.reshape(steps, BATCH, LENGTH + 1)


def report(side: str, losses: list[float]) -> None:
    """Prints one JSON line."""
    print(json.dumps({"side": side, "losses": [round(x, 6) for x in losses]}), flush=True)
