"""The sizes of one supernet beside the same sizes trained alone, each with the compute that the supernet spent on it.

    python experiments/progressive_shrinking/supernet.py [--task corpus] [--steps 400] [--seeds 0 1 2]

Embedded model; either its own corpus, by the tokens of held-out completions that are predicted right, or the
quickstart's task, by exact match. A step of the supernet takes three micro-batches of 16 rows: one for the whole
network, one for the smallest, one for a size between, at random. Alone, so, the two ends take as many steps of 16 rows,
and of the sizes between each its share of them.
What is alone keeps the greatest units after its first update, as the supernet keeps those before it, and begins with
their pretrained weights. Runs are kept in folders, and the same command goes on.
"""

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import sizes

from tunejax.config import load
from tunejax.recipes import artefact, evaluate, train

METRICS = {"corpus": "accuracy", "quickstart": "exact_match"}
"""Task -> the score that is compared."""
HELD_OUT = 50
"""Rows of each kind of the corpus to evaluate on."""
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
KEEP = {"heads": 0.5, "mlp": 0.5, "hidden": 0.72}
"""Of the smallest size."""
SIZES, ROWS = 5, 16
POINTS = 1.0
"""By which a size may be below the same size alone."""


def main() -> int:
    """Trains what is not trained yet, writes table and picture; 1 where a size falls short."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=METRICS, default="quickstart")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/supernet"))
    args = parser.parse_args()
    both: dict[str, list[list[float]]] = {"supernet": [], "alone": []}
    for seed in args.seeds:
        both["alone"].append([alone(i, seed, args) for i in range(SIZES)])
        both["supernet"].append(together(seed, args))
        (args.out / "sizes.json").write_text(json.dumps(both, indent=1))
        print(table(both), flush=True)
    picture(both, args.out / "sizes.png", f"{METRICS[args.task].replace('_', ' ')} on held-out rows, percent")
    print(f"picture: {args.out / 'sizes.png'}")
    short = [i for i, apart in enumerate(margins(both)) if apart < -POINTS]
    print(f"more than {POINTS:g} point below alone: " + (", ".join(f"size {i}" for i in short) or "none"))
    return 1 if short else 0


def together(seed: int, args: Any) -> list[float]:
    """Score in percent of each size of the supernet of a seed."""
    out = args.out / f"supernet-{seed}"
    taught = {"teacher": str(args.out / f"alone-0-{seed}"), "alpha": 0.5, "temperature": 1.0}
    supernet = {"name": "supernet", "keep": KEEP, "sizes": SIZES}
    run(out, seed, args, args.steps, [supernet], parts=3, more={"distill": taught})
    found = out / "sizes.json"
    if not found.is_file():
        tuned = [artefact.open_run(str(out), [f"method.1.size={i}"]) for i in range(SIZES)]
        scores = [evaluate.scores(t.parts, t.base, t.train, t.state)[METRICS[args.task]] for t in tuned]
        found.write_text(json.dumps([100 * x for x in scores]))
    return json.loads(found.read_text())


def alone(i: int, seed: int, args: Any) -> float:
    """Score in percent of size i of a seed, trained by itself."""
    kept = {name: 1 - i / (SIZES - 1) * (1 - part) for name, part in KEEP.items()}
    cut = {"name": "shrink", "keep": kept, "importance": "magnitude", "schedule": "one_shot", "every": 1}
    steps = args.steps if i in (0, SIZES - 1) else round(args.steps / (SIZES - 2))
    summary = run(args.out / f"alone-{i}-{seed}", seed, args, steps, [cut] if i else [])
    return 100 * summary[f"eval_{METRICS[args.task]}"]


def run(out: Path, seed: int, args: Any, steps: int, after: list[dict], parts: int = 1, more: Any = None) -> dict:
    """The summary of full tuning with the methods ``after`` it; ``parts`` micro-batches a step."""
    raw = {
        "output_dir": str(out),
        "seed": seed,
        "model": {"path": "embedded"},
        "data": rows(args.task, args.out),
        "method": [{"name": "full"}, *after],
        "train": {
            "learning_rate": args.learning_rate, "max_steps": steps, "train_batch_size": ROWS * parts,
            "gradient_accumulation_steps": parts, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05,
            "report_to": "none",
        },
        "generation": {"max_new_tokens": 8, "num_samples": 0},
        "evaluation": {"exact_match": args.task == "quickstart"},
        **(more or {}),
    }  # fmt: skip
    summary = train.run(load.check(raw, out.name))
    if f"eval_{METRICS[args.task]}" not in summary:
        sys.exit(f"{out}: stopped; the same command goes on")
    return summary


@functools.cache
def rows(task: str, out: Path) -> dict[str, Any]:
    """The section data of a task; the corpus is drawn and written once a process."""
    return load.read_file(QUICKSTART)["data"] if task == "quickstart" else sizes.embedded(out, HELD_OUT)[1]


def margins(both: dict[str, list[list[float]]]) -> list[float]:
    """Points by which each size of the supernet is above the same size alone, means over seeds."""
    means = {name: [statistics.mean(x) for x in zip(*rows, strict=True)] for name, rows in both.items()}
    return [a - b for a, b in zip(means["supernet"], means["alone"], strict=True)]


def table(both: dict[str, list[list[float]]]) -> str:
    """Markdown: a row a size, with every seed's score."""
    lines = ["| size | in the supernet | alone | apart |", "|---:|---|---|---:|"]
    for i, apart in enumerate(margins(both)):
        cells = [", ".join(f"{seed[i]:.1f}" for seed in both[name]) for name in ("supernet", "alone")]
        lines.append(f"| {i} | {' | '.join(cells)} | {apart:+.1f} |")
    return "\n".join(lines)


def picture(both: dict[str, list[list[float]]], path: Path, quality: str) -> None:
    """Means over seeds by size, with the least and the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for name, rows in both.items():
        seeds = list(zip(*rows, strict=True))
        mean = [statistics.mean(x) for x in seeds]
        spread = [[m - min(x) for m, x in zip(mean, seeds, strict=True)],
                  [max(x) - m for m, x in zip(mean, seeds, strict=True)]]  # fmt: skip
        axes.errorbar(range(SIZES), mean, yerr=spread, marker="o", capsize=3, label=name)
    axes.set_xlabel("size (0 is the whole network)")
    axes.set_xticks(range(SIZES))
    axes.set_ylabel(quality)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
