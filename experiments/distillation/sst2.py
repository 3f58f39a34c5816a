"""A three-layer student of MiniLM on SST-2, with its six-layer teacher and without, over seeds: table and picture.

python experiments/distillation/sst2.py --assets ../shared/assets
"""

import argparse
import json
import os
import statistics
from pathlib import Path

from tunejax.config import load
from tunejax.recipes import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KEPT = 0.97
"""The share of the teacher's accuracy that DistilBERT's abstract claims for half the layers."""


def main() -> None:
    """Trains what is not trained yet (runs are kept, and go on where they were stopped), then compares."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", default=os.environ.get("TUNEJAX_ASSETS", "../shared/assets"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("overrides", nargs="*", help="key=value, for every run (train.max_steps=20 for a trial)")
    args = parser.parse_args()
    os.environ["TUNEJAX_ASSETS"] = args.assets
    scores: dict[str, list[float]] = {"teacher": [], "student with teacher": [], "student alone": []}
    for seed in args.seeds:
        teacher = args.out / f"teacher-{seed}"
        scores["teacher"].append(accuracy("sst2/full.yaml", teacher, seed, args.overrides))
        for name, source in (("student with teacher", f"distill.teacher={teacher}"), ("student alone", "distill=null")):
            out = args.out / f"{name.replace(' ', '-')}-{seed}"
            scores[name].append(accuracy("distillation/sst2_student.yaml", out, seed, [source, *args.overrides]))
    (args.out / "sst2.json").write_text(json.dumps(scores, indent=1))
    print(table(scores))
    picture(scores, args.out / "sst2.png")
    print(f"picture: {args.out / 'sst2.png'}")


def accuracy(config: str, out: Path, seed: int, changes: list[str]) -> float:
    """Dev accuracy of a run, trained now unless its folder is finished."""
    settings = [f"output_dir={out}", f"seed={seed}", "train.report_to=none", "expected={}", *changes]
    return train.run(load.load(CONFIGS / config, settings))["eval_accuracy"]


def table(scores: dict[str, list[float]]) -> str:
    """Mean, standard deviation and share of the teacher's mean, in percent, as Markdown."""
    whole = statistics.mean(scores["teacher"])
    lines = ["| | accuracy | seeds | of the teacher's |", "|---|---|---|---|"]
    for name, values in scores.items():
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{100 * v:.1f}" for v in values)
        lines.append(f"| {name} | {100 * mean:.2f} ± {100 * spread:.2f} | {each} | {100 * mean / whole:.1f} |")
    return "\n".join(lines)


def picture(scores: dict[str, list[float]], path: Path) -> None:
    """A dot a seed and a bar at the mean; the dashed line is `KEPT` of the teacher's mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for x, values in enumerate(scores.values()):
        axes.scatter([x] * len(values), values, zorder=2)
        axes.hlines(statistics.mean(values), x - 0.2, x + 0.2)
    line = KEPT * statistics.mean(scores["teacher"])
    axes.axhline(line, linestyle="--", color="grey", linewidth=1, label=f"{KEPT:.0%} of the teacher")
    axes.set_xticks(range(len(scores)), [*scores])
    axes.set_ylabel("accuracy on dev")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
