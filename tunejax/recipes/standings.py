"""What the runs of a comparison came to: read from their folders, summed up by method, and written as tables."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tunejax import plots
from tunejax.config import compare, load, schema
from tunejax.core import errors
from tunejax.evaluate import scores
from tunejax.recipes import folder, page

FIGURES = (
    "trained_parameters", "trained_share", "optimizer_bytes", "step_memory_bytes", "tokens_per_second", "train_seconds"
)  # fmt: skip
"""Numbers of a run's summary that a table shows."""


class Outcome(NamedTuple):
    """One run. status: finished, failed or missing. reason: why it failed.

    quality: the metric on the held-out rows, of the step that the run keeps. seconds_to_target: of training, until an
    evaluation reached the target; None where none did or there is no target. held_out: rows that quality was measured
    on. asked: how many of them, and how answers were drawn, where the metric is exact match; a run keeps this though
    the config changes.
    """

    label: str
    seed: int
    status: str
    reason: str = ""
    quality: float | None = None
    seconds_to_target: float | None = None
    figures: dict[str, float | None] = {}  # noqa: RUF012
    devices: str = ""
    held_out: int | None = None
    asked: str = ""


class Row(NamedTuple):
    """One method over its finished runs; means, but for ``quality_*``. quality_std is the sample's, None of one run.

    reached: runs that reached the target; seconds_to_target is their mean. note: what a reader must know.
    """

    method: str
    runs: int
    finished: int
    failed: int
    quality_mean: float | None
    quality_std: float | None
    quality_min: float | None
    quality_max: float | None
    trained_parameters: float | None
    trained_share: float | None
    optimizer_bytes: float | None
    step_memory_bytes: float | None
    tokens_per_second: float | None
    train_seconds: float | None
    reached: int
    seconds_to_target: float | None
    note: str


class Standings(NamedTuple):
    """A comparison's results. rows: in the order of its methods."""

    name: str
    section: compare.CompareSection
    runs: list[Outcome]
    rows: list[Row]

    @property
    def devices(self) -> list[str]:
        """What the finished runs ran on."""
        return sorted({r.devices for r in self.runs if r.devices})

    def notes(self) -> list[str]:
        """Sentences that belong under the table."""
        seeds = ", ".join(map(str, self.section.seeds))
        said = [f"Quality is {self.section.metric} of the step that a run keeps (its last, or its best one under "
                "load_best_model_at_end or early stopping): mean ± sample standard deviation over seeds "
                f"{seeds}. {'Greater' if self.section.higher_wins else 'Smaller'} is better.",
                "Step memory is the compiler's count for one training step on one device: weights, optimiser state, "
                "batch and scratch. Speed and time leave out compiling, evaluation and saving."]  # fmt: skip
        if self.section.target is not None:
            said.append("Time to the target is that of the first evaluation that reached it.")
        counts = {r.label: r.held_out for r in self.runs if r.held_out is not None}
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{label} {count}" for label, count in counts.items())
            said.append(f"Methods were measured on different held-out rows ({each}): do not compare their quality.")
        asked: dict[str, list[str]] = {}
        for r in self.runs:
            if r.asked:
                asked.setdefault(r.asked, []).append(f"{r.label}, seed {r.seed}")
        if len(asked) > 1:
            each = "; ".join(f"{how}: {_some(names)}" for how, names in asked.items())
            said.append(f"Answers were drawn in different ways ({each}): do not compare their quality. A run whose "
                        "summary.json is removed is measured anew.")  # fmt: skip
        if len(self.devices) > 1:
            said.append(f"Runs ran on different devices ({'; '.join(self.devices)}): do not compare their speeds.")
        elif self.devices:
            said.append(f"Devices: {self.devices[0]}.")
        return said

    def cells(self) -> tuple[list[str], list[list[tuple[str, Any]]]]:
        """Heads, and for each row (text, value to sort by)."""
        columns = _columns(self.section)
        return [c.head for c in columns], [[(c.text(r), c.value(r)) for c in columns] for r in self.rows]

    def markdown(self) -> str:
        """The table and its notes in Markdown."""
        heads, body = self.cells()
        lines = [heads, ["---", *["---:"] * (len(heads) - 2), "---"], *[[text for text, _ in r] for r in body]]
        rows = ["| " + " | ".join(x.replace("|", "\\|").replace("\n", " ") for x in line) + " |" for line in lines]
        return "\n".join([f"# {self.name}", "", *rows, "", *(f"{n}  " for n in self.notes())]).rstrip() + "\n"

    def csv(self) -> str:
        """The rows as CSV with a header line; an empty field is a number that is not known."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(self.rows)
        return out.getvalue()

    def json(self) -> dict[str, Any]:
        """Rows and runs as plain values."""
        section = self.section
        judged = {k: getattr(section, k) for k in ("metric", "higher_wins", "target", "seeds")}
        return {
            "name": self.name,
            **judged,
            "methods": [r._asdict() for r in self.rows],
            "runs": [r._asdict() for r in self.runs],
        }

    def save(self, out: Path) -> None:
        """Writes table.md, table.csv and results.json."""
        folder.write(out / "table.md", self.markdown())
        folder.write(out / "table.csv", self.csv())
        folder.write_json(out / "results.json", self.json())


class _Column(NamedTuple):
    head: str
    text: Callable[[Row], str]
    value: Callable[[Row], Any]


def _columns(section: compare.CompareSection) -> list[_Column]:
    def number(head: str, name: str, text: Callable[[float], str]) -> _Column:
        return _Column(head, lambda r: _or_dash(getattr(r, name), text), lambda r: getattr(r, name))

    columns = [
        _Column("method", lambda r: r.method, lambda r: r.method),
        _Column(section.metric, _quality, lambda r: r.quality_mean),
        number("trained", "trained_parameters", lambda x: f"{x:,.0f}"),
        number("share", "trained_share", lambda x: f"{100 * x:.3g}%"),
        number("optimiser state", "optimizer_bytes", size),
        number("step memory", "step_memory_bytes", size),
        number("tokens/s", "tokens_per_second", lambda x: f"{x:,.0f}"),
        number("training", "train_seconds", duration),
    ]
    if section.target is not None:
        columns.append(_Column(f"time to {section.target:g}", _reached, lambda r: r.seconds_to_target))
    return [*columns, _Column("note", lambda r: r.note, lambda r: r.note)]


def collect(comparison: compare.Comparison) -> Standings:
    """Reads every run's folder. Raises ConfigError where a summary lacks the metric."""
    section = comparison.section
    runs = [outcome(r, section) for r in comparison.runs]
    rows = [summed(label, [r for r in runs if r.label == label], section) for label in section.methods]
    return Standings(comparison.name, section, runs, rows)


def outcome(run: compare.Run, section: compare.CompareSection) -> Outcome:
    """What one run came to."""
    out = Path(run.config.output_dir)
    if (out / "summary.json").is_file():
        found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        if section.metric not in found:
            numbers = [k for k in found if k.startswith("eval_")]
            raise errors.ConfigError(
                f"compare.metric: {out / 'summary.json'} has no {section.metric!r}. "
                f"{errors.did_you_mean(section.metric, numbers)}"
            )
        quality = folder.number(found[section.metric])
        figures = {k: found.get(k) for k in FIGURES}
        seconds = to_target(found, folder.read_rows(out / "metrics.jsonl"), section)
        if not math.isfinite(quality):
            return Outcome(run.label, run.seed, "failed", f"{section.metric} is {quality}", None, None, figures)
        held_out = found.get("rows", {}).get("eval_examples")
        drawn = section.metric == "eval_exact_match" and (out / "config.yaml").is_file()
        asked = how_asked(load.load(out / "config.yaml")) if drawn else ""
        return Outcome(
            run.label, run.seed, "finished", "", quality, seconds, figures, found.get("devices", ""), held_out, asked
        )
    if failure(out).is_file():
        note = json.loads(failure(out).read_text(encoding="utf-8"))
        return Outcome(run.label, run.seed, "failed", " ".join(note["reason"].split()))
    return Outcome(run.label, run.seed, "missing")


def how_asked(config: schema.Config) -> str:
    """What of a config exact match depends on, beside the model and the rows."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    drawn = {k: v for k in names if (v := getattr(config.generation, k)) is not None}
    return ", ".join([f"{config.evaluation.max_rows} rows at most", *(f"{k} {v:g}" for k, v in drawn.items())])


def failure(run: Path) -> Path:
    """The file beside a run's folder that says why it failed."""
    return run.with_name(run.name + ".failed.json")


def to_target(summary: dict[str, Any], rows: list[dict[str, Any]], section: compare.CompareSection) -> float | None:
    """Seconds of training until the target was reached: at the start, at an evaluation, or as measured at the end."""
    if section.target is None:
        return None
    before = summary.get("before_" + section.metric.removeprefix("eval_"))
    measured = [(0.0, before), *((r.get("train_seconds"), measured_in(r, section.metric)) for r in rows),
                (summary.get("train_seconds"), summary[section.metric])]  # fmt: skip
    return next((s for s, q in measured if s is not None and q is not None and section.reaches(q)), None)


def measured_in(row: dict[str, Any], metric: str) -> float | None:
    """The metric at an evaluation; perplexity is not written there, and follows from what is."""
    found = {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_") and v is not None}
    return scores.with_perplexity(found).get(metric.removeprefix("eval_"))


def summed(label: str, runs: list[Outcome], section: compare.CompareSection) -> Row:
    """The row of a method."""
    done = [r for r in runs if r.status == "finished"]
    failed = [r for r in runs if r.status == "failed"]
    quality = [r.quality for r in done if r.quality is not None]
    times = [r.seconds_to_target for r in done if r.seconds_to_target is not None]
    figures = {k: mean([x for r in done if (x := r.figures.get(k)) is not None]) for k in FIGURES}
    notes = [f"seed {r.seed} failed: {_first_sentence(r.reason)}" for r in failed]
    missing = len(runs) - len(done) - len(failed)
    if missing:
        notes.append(f"{missing} of {len(runs)} runs not made yet")
    return Row(
        method=label,
        runs=len(runs),
        finished=len(done),
        failed=len(failed),
        quality_mean=mean(quality),
        quality_std=statistics.stdev(quality) if len(quality) > 1 else None,
        quality_min=min(quality, default=None),
        quality_max=max(quality, default=None),
        **figures,
        reached=len(times),
        seconds_to_target=mean(times),
        note="; ".join(notes),
    )  # fmt: skip


def write(found: Standings, out: Path) -> None:
    """Writes the tables, the pictures (plots/) and the page (index.html)."""
    found.save(out)
    pictures = []
    for name, head, kind in (
        ("trained_parameters", "trained parameters", "count"),
        ("step_memory_bytes", "memory of one training step (MiB)", "bytes"),
        ("train_seconds", "seconds of training", "seconds"),
        ("seconds_to_target", f"seconds of training to {found.section.metric} {found.section.target}", "seconds"),
    ):
        unit = 2**20 if kind == "bytes" else 1
        points = [
            plots.Point(r.method, x / unit, r.quality_mean, r.quality_std or 0.0)
            for r in found.rows
            if (x := getattr(r, name)) is not None and r.quality_mean is not None
        ]
        path = out / "plots" / f"{name}.png"
        drawn = plots.pareto(
            points, path, xlabel=head, ylabel=found.section.metric, higher_wins=found.section.higher_wins
        )
        if drawn:
            pictures.append((head, drawn))
        else:
            path.unlink(missing_ok=True)
    heads, rows = found.cells()
    folder.write(out / "index.html", page.page(found.name, heads, rows, found.notes(), pictures))


def mean(values: list[float]) -> float | None:
    """Their mean, or None of none."""
    return statistics.fmean(values) if values else None


def size(nbytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:,.1f} {unit}"


def duration(seconds: float) -> str:
    """90.0 -> "1.5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _quality(row: Row) -> str:
    if row.quality_mean is None:
        return "failed" if row.failed else "-"
    spread = "" if row.quality_std is None else f" ± {row.quality_std:.4f}"
    return f"{row.quality_mean:.4f}{spread}"


def _reached(row: Row) -> str:
    if row.seconds_to_target is None:
        return "not reached" if row.finished else "-"
    some = "" if row.reached == row.finished else f" ({row.reached} of {row.finished})"
    return duration(row.seconds_to_target) + some


def _first_sentence(text: str) -> str:
    short = text.split(". ")[0]
    return short if len(short) <= 200 else short[:197] + "..."
