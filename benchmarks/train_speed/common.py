"""What every contender shares: the shape, the batches and the measuring. Standard library and numpy alone."""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

VOCAB, WIDTH, LAYERS, HEADS, MLP = 32000, 288, 6, 6, 768
BATCH, LENGTH = 8, 256
RANK, ALPHA = 8, 16
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""Llama with tied embeddings, 15.2M parameters; LoRA of rank 8 on all seven projections, AdamW, float32."""

Setup = tuple[Callable[[np.ndarray], float], int]


def arguments(**more: dict[str, Any]) -> argparse.Namespace:
    """The flags that every contender takes, and its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=("lora", "full"), required=True)
    parser.add_argument("--model", required=True, help="checkpoint folder of make_checkpoint.py")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them; the first ends the start-up time")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args()


def tokens(step: int) -> np.ndarray:
    """int32 [BATCH, LENGTH + 1]: inputs are [:, :-1], targets [:, 1:]. The same rows for every contender."""
    return np.random.default_rng(step).integers(0, VOCAB, (BATCH, LENGTH + 1), dtype=np.int32)


def process_age() -> float:
    """Seconds since this process was started by the kernel (interpreter and imports included)."""
    with open("/proc/self/stat") as f:
        started = int(f.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    with open("/proc/uptime") as f:
        return float(f.read().split()[0]) - started


def peak_mb() -> float:
    """Largest resident set of this process so far: interpreter, libraries, weights, everything (ru_maxrss)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, args: argparse.Namespace, setup: Callable[[], Setup]) -> None:
    """Runs a contender and prints one JSON line.

    Args:
      setup: () -> (step, trained); step takes rows int32 [BATCH, LENGTH + 1], updates the weights, waits for
        the result and returns the loss; trained is the number of parameters that train.
    """
    step, trained = setup()
    losses, first = [step(tokens(0))], process_age()
    for i in range(1, args.warmup):
        losses.append(step(tokens(i)))
    seconds, cpu = [], []
    for i in range(args.steps):
        rows = tokens(args.warmup + i)
        began, cpu_began = time.perf_counter(), time.process_time()
        losses.append(step(rows))
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    result = {
        "name": name,
        "mode": args.mode,
        "first_step_s": round(first, 2),
        "step_s": round(statistics.median(seconds), 4),
        "step_s_min": round(min(seconds), 4),
        "step_cpu_s": round(statistics.median(cpu), 4),
        "tokens_per_s": round(BATCH * LENGTH / statistics.median(seconds), 1),
        "peak_mb": round(peak_mb(), 1),
        "trained": trained,
        "losses": [round(x, 4) for x in losses],
    }
    print(json.dumps(result), file=sys.stdout, flush=True)
