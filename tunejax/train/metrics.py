"""What a run reports: numbers that stay on the device until they are logged, and the files that they go to."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from tunejax.core import errors

REPORTS = ("tensorboard", "wandb")


class Meter:
    """Collects steps' metrics as device arrays; `read` fetches them in one transfer and averages.

    The loss and the objective's metrics are averaged by ``weight``, so the mean over a logging interval is that of
    all its tokens; ``nonfinite`` is the largest seen; grad_norm is the last.
    """

    def __init__(self) -> None:
        self._steps: list[Mapping[str, jax.Array]] = []
        self._tokens, self._since = 0, time.perf_counter()

    def add(self, metrics: Mapping[str, jax.Array], tokens: int) -> None:
        """One step's metrics, and how many tokens (padding left out) it read over all processes."""
        self._steps.append(metrics)
        self._tokens += tokens

    def wait(self, behind: int = 4) -> None:
        """Blocks until the step ``behind`` steps back is done: dispatch must not run ahead with batches in memory."""
        if len(self._steps) > behind:
            jax.block_until_ready(self._steps[-1 - behind]["loss"])

    def read(self) -> dict[str, float]:
        """Means since the last call, with tokens_per_second where known; starts anew. Empty where no step was added."""
        if not self._steps:
            return {}
        steps = jax.device_get(self._steps)
        self._steps = []
        out = _averaged(steps)
        if self._tokens:
            out["tokens_per_second"] = self._tokens / max(time.perf_counter() - self._since, 1e-9)
        self.restart_clock()
        return out

    def restart_clock(self) -> None:
        """Leaves time and tokens since the last `read` out of the speed (something else ran); their metrics stay."""
        self._tokens, self._since = 0, time.perf_counter()


class Stopwatch:
    """Seconds spent and tokens read by training alone; stands still until `go`, and again from `stop` on."""

    def __init__(self, seconds: float = 0.0, tokens: int = 0) -> None:
        self._seconds, self.tokens = seconds, tokens
        self._since: float | None = None

    def go(self) -> None:
        """Runs from now on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stands still; the caller has waited for the device."""
        self._seconds, self._since = self.seconds, None

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._since is not None

    @property
    def seconds(self) -> float:
        """So far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def tokens_per_second(self) -> float | None:
        """The mean, or None before anything was timed."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def _averaged(steps: list[dict[str, np.ndarray]]) -> dict[str, float]:
    weights = np.array([s["weight"] for s in steps], np.float64)
    good = np.isfinite(weights) & (np.array([s["nonfinite"] for s in steps]) == 0)
    out = {}
    for name in sorted(steps[0], key=lambda n: (n != "loss", n)):
        values = np.array([s[name] for s in steps], np.float64)
        if name == "nonfinite":
            out[name] = float(values.max())
        elif name == "weight":
            out[name] = float(weights[good].sum())
        elif name == "grad_norm" or not good.any():
            out[name] = float(values[-1])
        else:
            out[name] = float((values[good] * weights[good]).sum() / max(weights[good].sum(), 1e-9))
    return out


class Writer(Protocol):
    """Where numbers go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """``values`` by name, at ``step``."""

    def close(self) -> None:
        """Nothing is lost after this."""


class JsonLines:
    """One JSON object a line: {"step": n, name: value, ...}; a number that is not finite is written as null."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Appends to ``path``; lines after ``resume_step`` are dropped, for the run is about to write them again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            part = path.with_name(path.name + ".part")
            part.write_text("".join(line + "\n" for line in kept))
            part.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; a line once written survives the process."""
        finite = {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a kill cut short


class TensorBoard:
    """Event files for TensorBoard, through `tensorboardX`."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        import tensorboardX

        purge = resume_step + 1 if resume_step else None
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a name; "eval_loss" is shown as eval/loss, others as train/name."""
        for name, value in values.items():
            tag = "eval/" + name[5:] if name.startswith("eval_") else "train/" + name
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class WandB:
    """Weights & Biases, where it is installed; account and project come from its own environment variables."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise errors.ConfigError("report_to names wandb, which is not installed: pip install wandb") from None
        # The id is the run folder's own, so that a resumed run goes on in the same place.
        self._run = wandb.init(dir=str(folder), id=folder.name.replace("/", "-"), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One call a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def make_writers(folder: Path, report_to: Iterable[str] = ("tensorboard",), resume_step: int = 0) -> list[Writer]:
    """JSON Lines (``metrics.jsonl``) and what ``report_to`` names; none on processes other than the first.

    Raises:
      ConfigError: an unknown name, or one that is not installed.
    """
    names = list(report_to)
    for name in names:
        if name not in REPORTS:
            raise errors.ConfigError(f"report_to: no {name!r}. {errors.did_you_mean(name, REPORTS)}")
    if jax.process_index():
        return []
    writers: list[Any] = [JsonLines(folder / "metrics.jsonl", resume_step)]
    if "tensorboard" in names:
        writers.append(TensorBoard(folder / "tensorboard", resume_step))
    if "wandb" in names:
        writers.append(WandB(folder))
    return writers
