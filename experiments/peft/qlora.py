"""LoRA on a base in NF4 beside LoRA on the base as it is: the same rows and order, 200 steps.

    python experiments/peft/qlora.py --assets ../shared/assets

`VARIANTS` differ in how many inputs share a scale (64 is the paper's, and much for a kernel of 64 inputs) and in
LoftQ's start. The table has them all; the exit code is 1 where a model has no variant within `LIMIT` of LoRA.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from tunejax.config import load
from tunejax.recipes import folder, train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = {"embedded": "quickstart.yaml", "stories260k": "stories/lora.yaml"}
VARIANTS: dict[str, dict[str, Any]] = {
    "nf4, blocks of 64": {"name": "quantize", "kind": "nf4"},
    "nf4, blocks of 16": {"name": "quantize", "kind": "nf4", "block_size": 16},
    "LoftQ, blocks of 64": {"name": "loftq", "kind": "nf4"},
    "LoftQ, blocks of 16": {"name": "loftq", "kind": "nf4", "block_size": 16},
}
LIMIT, LAST = 0.02, 20


def main() -> int:
    """Prints the table; 1 where no variant comes within `LIMIT` of LoRA's losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", default=os.environ.get("TUNEJAX_ASSETS", "../shared/assets"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--models", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--out", type=Path, default=Path("runs/qlora"))
    args = parser.parse_args()
    os.environ["TUNEJAX_ASSETS"] = args.assets
    missed = False
    print(
        f"| model | base | last {LAST} steps | of LoRA's | held out | of LoRA's |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for model in args.models:
        plain = losses(model, args.out / f"{model}-lora", args.steps, None)
        print(f"| {model} | float32 | {plain[0]:.4f} | 1 | {plain[1]:.4f} | 1 |", flush=True)
        worst = []
        for name, first in VARIANTS.items():
            found = losses(model, args.out / f"{model}-{name.replace(', ', '-').replace(' ', '_')}", args.steps, first)
            a, b = (x / y for x, y in zip(found, plain, strict=True))
            print(f"| {model} | {name} | {found[0]:.4f} | {a:.4f} | {found[1]:.4f} | {b:.4f} |", flush=True)
            worst.append(max(a, b) - 1)
        missed |= min(worst) > LIMIT
    return int(missed)


def losses(model: str, out: Path, steps: int, first: dict[str, Any] | None) -> tuple[float, float]:
    """(mean training loss of the last steps, loss on held-out rows) of one run, whose base ``first`` makes."""
    plain = load.load(CONFIGS / RUNS[model], [f"output_dir={out}"])
    lora = dict(plain.method[0] if isinstance(plain.method, list) else plain.method)
    changes = {
        "output_dir": str(out),
        "method": chained(lora, first),
        "expected": {},
        "train": {**plain.train.model_dump(), "max_steps": steps, "logging_steps": 1, "report_to": "none"},
        "evaluation": {"exact_match": False},
        "generation": {**plain.generation.model_dump(), "num_samples": 0},
    }
    summary = train.run(load.check({**plain.model_dump(), **changes}))
    rows = folder.read_rows(out / "metrics.jsonl")
    return statistics.mean([r["loss"] for r in rows if "loss" in r][-LAST:]), summary["eval_loss"]


def chained(lora: dict[str, Any], first: dict[str, Any] | None) -> Any:
    """The run's method: LoRA alone, above a rounded base, or as LoftQ, which is both."""
    if first is None:
        return lora
    return [first, lora] if first["name"] == "quantize" else {**lora, **first}


if __name__ == "__main__":
    sys.exit(main())
