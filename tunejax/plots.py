"""Pictures of a run, drawn from its metrics."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

EVAL = "eval_"


def loss(rows: Iterable[Mapping[str, Any]], path: Path, title: str = "") -> Path | None:
    """Draws training loss, its running mean and evaluation loss against the step as a PNG.

    Args:
      rows: of metrics.jsonl: a ``step`` with ``loss`` or ``eval_loss``.
      path: of the PNG; its folder is made.

    Returns:
      ``path``, or None where no row has a loss.
    """
    rows = list(rows)
    train = _series(rows, "loss")
    held_out = _series(rows, f"{EVAL}loss")
    if not train and not held_out:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure without pyplot: no global state, no display, nothing to close.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    if train:
        steps, values = zip(*train, strict=True)
        axis.plot(steps, values, color="0.75", linewidth=1, label="training")
        axis.plot(steps, running_mean(values), color="tab:blue", label="training, running mean")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=4, label="held out")
    axis.set(xlabel="step", ylabel="loss (nats)", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _series(rows: list[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) in order; where a resumed run logged a step twice, the later one."""
    found = {int(r["step"]): float(r[name]) for r in rows if isinstance(r.get(name), int | float) and "step" in r}
    return sorted(found.items())


def running_mean(values: Iterable[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start (as in Adam)."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + 1 - decay
        out.append(total / weight)
    return out


def pareto(
    points: Iterable[tuple[str, float, float, float]],
    path: Path,
    x: str,
    y: str,
    *,
    higher_wins: bool,
    log: bool = True,
) -> Path:
    """Draws what a quality costs as a PNG: a labelled point a method, with its spread, and the line of the best.

    Args:
      points: (label, cost, mean quality, standard deviation). A cost of 0 is left out where the axis is logarithmic.
      path: of the PNG; its folder is made.
      x, y: names of the axes.
      higher_wins: whether more quality is better.
      log: whether the axis of costs is logarithmic.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    shown = [p for p in points if p[1] > 0 or not log]
    for label, cost, mean, spread in shown:
        axis.errorbar(cost, mean, yerr=spread, fmt="o", markersize=5, capsize=2)
        axis.annotate(label, (cost, mean), xytext=(5, 4), textcoords="offset points", fontsize=8)
    best = front([(cost, mean) for _, cost, mean, _ in shown], higher_wins)
    axis.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0) if len(best) > 1 else None
    axis.set(xlabel=x, ylabel=y, xscale="log" if log and shown else "linear")
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def front(points: Iterable[tuple[float, float]], higher_wins: bool) -> list[tuple[float, float]]:
    """The (cost, quality) pairs that no other one beats in both, by rising cost."""
    out: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda p: (p[0], -p[1] if higher_wins else p[1])):
        if not out or (quality > out[-1][1] if higher_wins else quality < out[-1][1]):
            out.append((cost, quality))
    return out
