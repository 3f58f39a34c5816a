"""Perplexity against size: shrunk by degrees and taught, cut at one stroke and tuned, or trained from scratch as small.

    TUNEJAX_ASSETS=folder python experiments/progressive_shrinking/sizes.py [--models embedded stories] [--steps 400]

All runs of a model take the same steps on the same rows. From scratch means random weights behind masks from the first
update on, which is the small model. Runs are kept in folders, and the same command goes on.
"""

import argparse
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tunejax.config import load
from tunejax.models import cost, cut
from tunejax.recipes import artefact, train

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "embedded_model"))
import corpus

PARTS = (0.75, 0.5, 0.35)
"""Of the model's parameters."""
DIMENSIONS = ["heads", "mlp", "hidden"]
RECIPES = ("whole", "shrunk by degrees, taught", "one stroke, tuned", "from scratch")
ROWS, HELD_OUT = 8000, 10
"""Rows of the embedded model's corpus: to train on, and of each kind to evaluate on."""


def main() -> None:
    """Trains what is not trained yet, then writes a table and a picture for each model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", default=os.environ.get("TUNEJAX_ASSETS", "../shared/assets"))
    parser.add_argument("--models", nargs="+", choices=["embedded", "stories"], default=["embedded", "stories"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--masking", type=int, help="updates from first mask to last; a quarter of all unless told")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/shrinking_sizes"))
    args = parser.parse_args()
    for name in args.models:
        model, data = embedded(args.out) if name == "embedded" else stories(Path(args.assets))
        points = [
            {"recipe": recipe, "part": part, **run(name, model, data, recipe, part, args)}
            for recipe, part in [(RECIPES[0], 1.0), *itertools.product(RECIPES[1:], PARTS)]
        ]
        (args.out / f"{name}.json").write_text(json.dumps(points, indent=1))
        print(table(points))
        picture(points, args.out / f"{name}.png", f"{name}: {args.steps} steps")
        print(f"picture: {args.out / f'{name}.png'}")


def embedded(out: Path, held_out: int = HELD_OUT) -> tuple[str, dict[str, Any]]:
    """The embedded model, and rows of the corpus that it was pretrained on, drawn anew and written to files.

    held_out: of each kind to evaluate on.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = {"train": out / "embedded_train.jsonl", "eval": out / "embedded_eval.jsonl"}
    drawn = (row for _, row in corpus.rows(1))
    rows = {
        "train": [*itertools.islice((r for r in drawn if r[0]), ROWS)],
        "eval": [r for kind in corpus.KINDS for r in corpus.evaluation_rows(kind, held_out)],
    }
    for name, path in files.items():
        path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows[name]))
    template = "<|user|>{prompt}<|assistant|>"
    paths = {"path": str(files["train"]), "eval_path": str(files["eval"])}
    return "embedded", {**paths, "template": template, "max_length": 96, "on_bad_row": "skip"}


def stories(assets: Path) -> tuple[str, dict[str, Any]]:
    """stories260k and the stories of configs/stories."""
    text = assets / "data" / "tinystories_sample"
    data = {"path": str(text / "train.txt.gz"), "eval_path": str(text / "valid.txt"), "format": "text"}
    rest = {"max_length": 256, "eos_token_id": 1, "truncation": "end", "packing": True, "max_eval_rows": 80}
    return str(assets / "models" / "stories260k"), {**data, **rest}


def run(name: str, model: str, data: dict[str, Any], recipe: str, part: float, args: Any) -> dict[str, float]:
    """Parameters once cut, and perplexity on held-out rows, of one run."""
    shrink = {"name": "shrink", "keep": DIMENSIONS, "parameters": part, "every": 10, "kv_head_counts": None}
    masking = args.masking or args.steps // 4
    taught = {"teacher": model, "alpha": 0.5, "temperature": 1.0}
    method, own = {
        "whole": ([{"name": "full"}], {}),
        "shrunk by degrees, taught": ([{"name": "full"}, {**shrink, "begin": 20, "steps": masking}], taught),
        "one stroke, tuned": ([{"name": "full"}, {**shrink, "begin": 20, "schedule": "one_shot"}], {}),
        "from scratch": ([{"name": "full"}, {**shrink, "every": 1, "schedule": "one_shot"}], {}),
    }[recipe]
    out = args.out / name / f"{recipe.replace(',', '').replace(' ', '-')}-{part:g}-{args.seed}"
    if recipe == RECIPES[1] and args.masking:
        out = out.with_name(f"{out.name}-masking-{masking}")
    raw = {
        "output_dir": str(out),
        "seed": args.seed,
        "model": {"path": model, "random_init": recipe == "from scratch"},
        "data": data,
        "method": method,
        "train": {
            "learning_rate": 2e-3, "max_steps": args.steps, "train_batch_size": args.batch, "warmup_steps": 20,
            "lr_scheduler_type": "cosine", "report_to": "none",
        },
        "generation": {"num_samples": 0},
        "evaluation": {"exact_match": False},
        **({"distill": own} if own else {}),
    }  # fmt: skip
    summary = train.run(load.check(raw, recipe))
    if "eval_loss" not in summary:
        sys.exit(f"{out}: stopped; the same command goes on")
    return {"parameters": parameters(out), "perplexity": math.exp(summary["eval_loss"])}


def parameters(folder: Path) -> int:
    """Of the model that is left once what the run masked is cut away."""
    tuned = artefact.open_run(str(folder))
    config = tuned.parts.model_config
    masks = cut.masks(tuned.params, config)
    smaller = cut.cut(cut.bare(tuned.params), masks, config)[1] if masks else config
    return cost.parameters(smaller, "lm")


def table(points: list[dict[str, Any]]) -> str:
    """Rows of points as Markdown."""
    lines = ["| | parameters | perplexity |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {p['recipe']} | {p['parameters']:,} | {p['perplexity']:.3f} |" for p in points)])


def picture(points: list[dict[str, Any]], path: Path, title: str) -> None:
    """A line a recipe; the whole model is a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for recipe in RECIPES[1:]:
        own = sorted((p["parameters"] / 1e3, p["perplexity"]) for p in points if p["recipe"] == recipe)
        axes.plot(*zip(*own, strict=True), marker="o", label=recipe)
    axes.axhline(points[0]["perplexity"], linestyle="--", color="grey", linewidth=1, label="the whole model, tuned")
    axes.set_xlabel("thousands of parameters")
    axes.set_ylabel("perplexity of held-out rows")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
