"""The bar that a person watches: step, loss, tokens a second, time left."""

import sys
from typing import Any

import jax


class Progress:
    """A bar on standard error where that is a terminal; otherwise one line a report. Silent unless ``shown``.

    Context manager. Only the first process shows anything.
    """

    def __init__(self, total: int | None, start: int = 0, *, shown: bool = True, what: str = "train") -> None:
        self.total = total
        self._shown = shown and jax.process_index() == 0
        self._start, self._what = start, what
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if self._shown and sys.stderr.isatty():
            from rich import console, progress

            self._bar = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[text]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("<"),
                progress.TimeRemainingColumn(),
                console=console.Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self.total, completed=self._start, text="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int) -> None:
        """``step`` batches are on their way."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, values: dict[str, float]) -> None:
        """Shows what was just logged."""
        if not self._shown:
            return
        text = "  ".join(_shown(name, v) for name, v in values.items() if name in _WATCHED or "eval_" in name)
        if self._bar:
            self._bar.update(self._task, text=text)
            if any(name.startswith("eval_") for name in values):
                self._bar.console.print(f"step {step}: {text}")
        else:
            print(f"step {step}/{self.total or '?'}  {text}", file=sys.stderr, flush=True)


_WATCHED = ("loss", "accuracy", "tokens_per_second")  # more would not leave the bar room on 80 columns


def _shown(name: str, value: float) -> str:
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    return f"{name} {value:.4g}"
