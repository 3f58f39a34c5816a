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
