"""LoRA on a base in NF4 beside LoRA on the base as it is: the same rows, order and start, 200 steps.

python experiments/peft/qlora.py --assets ../shared/assets
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

from tunejax.config import load
from tunejax.recipes import folder, train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = {"embedded": "quickstart.yaml", "stories260k": "stories/lora.yaml"}
LIMIT, LAST = 0.02, 20


def main() -> int:
    """Prints the table; 1 where a QLoRA loss is more than `LIMIT` above LoRA's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", default=os.environ.get("TUNEJAX_ASSETS", "../shared/assets"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--models", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--out", type=Path, default=Path("runs/qlora"))
    args = parser.parse_args()
    os.environ["TUNEJAX_ASSETS"] = args.assets
    print("| model | loss | LoRA | QLoRA (nf4) | ratio |\n|---|---|---|---|---|")
    worst = 0.0
    for model in args.models:
        pairs = [losses(model, args.out / f"{model}-{name}", args.steps, name) for name in ("lora", "qlora")]
        for kind, a, b in zip((f"last {LAST} steps", "held out"), *pairs, strict=True):
            print(f"| {model} | {kind} | {a:.4f} | {b:.4f} | {b / a:.4f} |")
            worst = max(worst, b / a - 1)
    return int(worst > LIMIT)


def losses(model: str, out: Path, steps: int, name: str) -> tuple[float, float]:
    """(mean training loss of the last steps, loss on held-out rows) of one run."""
    plain = load.load(CONFIGS / RUNS[model], [f"output_dir={out}"])
    lora = plain.method if isinstance(plain.method, list) else [plain.method]
    changes = {
        "output_dir": str(out),
        "method": lora if name == "lora" else [{"name": "quantize", "kind": "nf4"}, *lora],
        "expected": {},
        "train": {**plain.train.model_dump(), "max_steps": steps, "logging_steps": 1, "report_to": "none"},
        "evaluation": {"exact_match": False},
        "generation": {**plain.generation.model_dump(), "num_samples": 0},
    }
    summary = train.run(load.check({**plain.model_dump(), **changes}))
    rows = folder.read_rows(out / "metrics.jsonl")
    return statistics.mean([r["loss"] for r in rows if "loss" in r][-LAST:]), summary["eval_loss"]


if __name__ == "__main__":
    sys.exit(main())
