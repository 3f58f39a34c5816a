"""`tunejax compare CONFIG`: one task, several methods and seeds, one table and its pictures."""

import argparse
import csv
import io
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tunejax import plots
from tunejax.config import compare as compare_config
from tunejax.config import schema
from tunejax.core import errors
from tunejax.recipes import folder, page, train

COSTS = {
    "trained": "trained parameters",
    "step_bytes": "memory of a step (bytes)",
    "optimizer_bytes": "optimiser state (bytes)",
    "microseconds": "microseconds a token",
}


class Line(NamedTuple):
    """A method in the table; means over the seeds that finished. failed: seed -> why it has no number."""

    label: str
    metric: float | None
    spread: float
    trained: int
    share: float
    optimizer_bytes: int
    step_bytes: int
    tokens_per_second: float
    steps_to_target: float | None
    failed: dict[int, str]

    @property
    def microseconds(self) -> float:
        """Of training, a token; 0 where nothing was trained."""
        return 1e6 / self.tokens_per_second if self.tokens_per_second else 0.0


def main(args: argparse.Namespace) -> int:
    """Trains what is not trained yet and writes table and pictures; 1 where a run failed."""
    section, runs = compare_config.read(args.config, args.overrides)
    out = Path(next(iter(runs.values())).output_dir).parents[2]
    lines = compare(section, runs, out)
    print(markdown(lines, section))
    print(f"\n{out}: table.md, table.csv, table.json, index.html and pictures")
    return int(any(line.failed for line in lines))


def compare(
    section: compare_config.CompareSection, runs: dict[tuple[str, int], schema.Config], out: Path
) -> list[Line]:
    """Runs each config, or reads it where it is finished, and writes the results so far after each.

    A run that fails is kept in the table with its reason; the others go on.

    Raises:
      ConfigError: a run's folder belongs to another config; the metric is not in a finished run's summary.
    """
    for config in runs.values():
        folder.claim(config)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    lines: list[Line] = []
    for i, ((label, seed), config) in enumerate(runs.items(), 1):
        print(f"[{i}/{len(runs)}] {label}, seed {seed}", file=sys.stderr, flush=True)
        found[label, seed] = one(config)
        if found[label, seed].get("stopped", "").startswith("SIG"):
            raise errors.TunejaxError(f"stopped in {config.output_dir}; the same command goes on from there")
        lines = [line(name, section, runs, found) for name in section.methods if any(k[0] == name for k in found)]
        write(out, lines, section)
    return lines


def one(config: schema.Config) -> dict[str, Any]:
    """The summary of a run, with its failure as ``error``."""
    try:
        return train.run(config)
    except errors.TunejaxError as e:
        return {"error": str(e).splitlines()[0]}


def line(
    label: str,
    section: compare_config.CompareSection,
    runs: dict[tuple[str, int], schema.Config],
    found: dict[tuple[str, int], dict[str, Any]],
) -> Line:
    """The line of one method from the summaries of its seeds."""
    mine = {seed: s for (name, seed), s in found.items() if name == label}
    done = {seed: s for seed, s in mine.items() if "error" not in s}
    for s in done.values():
        if section.metric not in s:
            near = errors.did_you_mean(section.metric, [k for k, v in s.items() if isinstance(v, float)])
            raise errors.ConfigError(f"compare.metric is {section.metric!r}, which the summaries do not have. {near}")
    values = [s[section.metric] for s in done.values()]
    logged = {seed: folder.read_rows(Path(runs[label, seed].output_dir) / "metrics.jsonl") for seed in done}
    speeds = [r["tokens_per_second"] for rows in logged.values() for r in rows if "tokens_per_second" in r]
    any_ = next(iter(done.values()), {})
    return Line(
        label,
        statistics.mean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else 0.0,
        any_.get("trained_parameters", 0),
        any_.get("trained_parameters", 0) / max(any_.get("all_parameters", 1), 1),
        any_.get("optimizer_bytes", 0),
        any_.get("step_bytes", 0),
        statistics.median(speeds) if speeds else 0.0,
        _mean_or_none([reached(rows, section) for rows in logged.values()]),
        {seed: s["error"] for seed, s in mine.items() if "error" in s},
    )


def reached(rows: list[dict[str, Any]], section: compare_config.CompareSection) -> int | None:
    """The step of the first evaluation at which the metric was as good as the target, or None."""
    for row in rows:
        value = row.get(section.metric)
        if section.target is not None and value is not None:
            met = value >= section.target if section.higher_wins else value <= section.target
            if met:
                return int(row["step"])
    return None


def _mean_or_none(values: list[int | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def ranked(lines: list[Line], section: compare_config.CompareSection) -> list[Line]:
    """The best first; methods without a number last."""
    worst = float("-inf") if section.higher_wins else float("inf")
    return sorted(lines, key=lambda x: worst if x.metric is None else x.metric, reverse=section.higher_wins)


def cells(x: Line, section: compare_config.CompareSection) -> dict[str, str]:
    """What the table shows of a line, by column."""
    shown = {"method": x.label, section.metric: "failed" if x.metric is None else f"{x.metric:.4f} ± {x.spread:.4f}"}
    shown |= {
        "trained": f"{x.trained:,}",
        "share": f"{100 * x.share:.3g}%",
        "optimiser MB": f"{x.optimizer_bytes / 1e6:.2f}",
        "step MB": f"{x.step_bytes / 1e6:.1f}",
        "tokens/s": f"{x.tokens_per_second:,.0f}",
    }
    if section.target is not None:
        shown[f"steps to {section.target:g}"] = "-" if x.steps_to_target is None else f"{x.steps_to_target:.0f}"
    return shown


def markdown(lines: list[Line], section: compare_config.CompareSection) -> str:
    """The table, and below it why runs failed."""
    rows = [cells(x, section) for x in ranked(lines, section)]
    head = list(rows[0])
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    out += ["| " + " | ".join(r.values()) + " |" for r in rows]
    return "\n".join(out + [f"\n{x.label}, seed {seed}: {why}" for x in lines for seed, why in x.failed.items()])


def write(out: Path, lines: list[Line], section: compare_config.CompareSection) -> None:
    """table.md, table.csv, table.json, a picture a cost, and index.html with all of them inside."""
    rows = [cells(x, section) for x in ranked(lines, section)]
    text = io.StringIO()
    fields = csv.DictWriter(text, ["metric", *(f for f in Line._fields if f not in ("metric", "failed"))])
    fields.writeheader()
    fields.writerows({k: v for k, v in x._asdict().items() if k != "failed"} for x in lines)
    folder.write(out / "table.md", markdown(lines, section) + "\n")
    folder.write(out / "table.csv", text.getvalue())
    folder.write_json(out / "table.json", {"compare": section.model_dump(), "lines": [x._asdict() for x in lines]})
    known = [x for x in lines if x.metric is not None]
    pictures = []
    for name, title in COSTS.items():
        points = [(x.label, float(getattr(x, name)), float(x.metric or 0), x.spread) for x in known]
        pictures.append(
            plots.pareto(points, out / f"{name}.png", title, section.metric, higher_wins=section.higher_wins)
        )
    failures = [f"{x.label}, seed {seed}: {why}" for x in lines for seed, why in x.failed.items()]
    folder.write(out / "index.html", page.html(f"{section.metric} by method", rows, pictures, failures))
