"""Pictures of a run, drawn from its metrics, and of several runs beside each other."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


class Point(NamedTuple):
    """What something costs, and how good it is, give or take ``spread``."""

    label: str
    cost: float
    quality: float
    spread: float = 0.0


def pareto(points: Iterable[Point], path: Path, *, xlabel: str, ylabel: str, higher_wins: bool = True) -> Path | None:
    """Draws quality against cost as a PNG, with a line through the points that no other one beats in both.

    Returns:
      ``path``, or None where there is no point.
    """
    points = sorted(points, key=lambda p: p.cost)
    if not points:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    best = unbeaten(points, higher_wins)
    edge = [(p.cost, p.quality) for p in best]
    axis.step(*zip(*edge, strict=True), where="post", color="tab:blue", linewidth=1, alpha=0.6, zorder=1)
    for p in points:
        color = "tab:blue" if p in best else "0.55"
        axis.errorbar(p.cost, p.quality, yerr=p.spread or None, fmt="o", color=color, capsize=2, markersize=5)
    if points[0].cost > 0 and points[-1].cost > 20 * points[0].cost:
        axis.set_xscale("log")
    axis.margins(x=0.12, y=0.12)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    _write_labels(figure, axis, points)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def unbeaten(points: Iterable[Point], higher_wins: bool = True) -> list[Point]:
    """The Pareto front, by rising cost: each point is better than every one that costs no more."""
    sign = 1 if higher_wins else -1
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (p.cost, -sign * p.quality)):
        if not front or sign * p.quality > sign * front[-1].quality:
            front.append(p)
    return front


_PLACES = (
    (6, 4, "left"),
    (6, -11, "left"),
    (-6, 4, "right"),
    (-6, -11, "right"),
    (0, 11, "center"),
    (0, -18, "center"),
)


def _write_labels(figure: Any, axis: Any, points: list[Point]) -> None:
    """Each label beside its point, at the first place where it lies over no other label or point, if there is one."""
    figure.draw_without_rendering()
    taken = [_around(axis.transData.transform((p.cost, p.quality))) for p in points]
    for p in points:
        boxes = []
        for dx, dy, side in _PLACES:
            text = axis.annotate(
                p.label, (p.cost, p.quality), (dx, dy), textcoords="offset points", ha=side, fontsize=8
            )
            boxes.append((text, text.get_window_extent()))
        free = [b for b in boxes if not any(b[1].overlaps(t) for t in taken)]
        kept = (free or boxes)[0]
        for text, _ in boxes:
            if text is not kept[0]:
                text.remove()
        taken.append(kept[1])


def _around(at: Any, radius: float = 3.0) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius)


WIDEST = 2.0
"""Longest bar of `shares`; a longer one ends in its number."""


def shares(bars: Iterable[tuple[str, float]], path: Path, title: str = "") -> Path | None:
    """Draws ratios (label, value) as horizontal bars beside a line at 1, as a PNG.

    Returns:
      ``path``, or None where there is no bar.
    """
    bars = list(bars)
    if not bars:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.9 + 0.45 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    widths = [min(value, WIDEST) for _, value in bars]
    drawn = axis.barh([label for label, _ in bars], widths, color="tab:blue", height=0.6)
    axis.bar_label(drawn, labels=[f"{100 * value:.1f}%" for _, value in bars], padding=3, fontsize=8)
    axis.axvline(1.0, color="0.5", linewidth=1)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(xlabel="after / before", title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
