"""The loop around the step: when to log, evaluate, save and stop. It knows no method, no model and no config."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from tunejax.core import errors
from tunejax.core.paths import Params
from tunejax.train import checkpoint as checkpoint_lib
from tunejax.train import metrics as metrics_lib
from tunejax.train import progress as progress_lib
from tunejax.train import signals
from tunejax.train.evaluation import evaluate
from tunejax.train.state import TrainState
from tunejax.train.step import Steps


@dataclasses.dataclass(frozen=True)
class Options:
    """When things happen; the names are those of `transformers.TrainingArguments`. All intervals count steps.

    max_steps: stop after so many; None: when the data ends.
    logging_steps: the only times (besides evaluation and saving) that the host waits for the device.
    eval_steps, save_steps: None: only at the end.
    metric_for_best_model: with or without "eval_". greater_is_better: by default false for a loss or nll, else true.
    early_stopping_patience: evaluations in a row without a better one, by more than early_stopping_threshold.
    max_nonfinite_steps: stop after so many skipped updates in a row.
    progress: show a bar.
    """

    max_steps: int | None = None
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    max_nonfinite_steps: int = 5
    progress: bool = True

    @property
    def best_metric(self) -> str:
        """The metric's name with its "eval_"."""
        name = self.metric_for_best_model
        return name if name.startswith("eval_") else "eval_" + name

    @property
    def higher_wins(self) -> bool:
        """Whether the best is the highest."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not any(word in self.best_metric for word in ("loss", "nll"))


@dataclasses.dataclass
class Result:
    """state: the last. step: batches consumed. stopped: "max_steps", "data", "early", or a signal's name.

    best_step, best: of the best evaluation. history: what was logged, one dict a time, each with "step".
    resumed_from: the step of the checkpoint that this run began from, or 0.
    watch: time and tokens of all steps up to this one, those before resuming too; without the first step of each shape
      (which compiles), evaluations and saving.
    memory: bytes of the compiled step on each device (`Step.memory`), the greatest of the shapes that were run.
    """

    state: TrainState
    step: int = 0
    stopped: str = ""
    best_step: int | None = None
    best: float | None = None
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    resumed_from: int = 0
    watch: metrics_lib.Stopwatch = dataclasses.field(default_factory=metrics_lib.Stopwatch)
    memory: int | None = None


def fit(
    step: Steps,
    state: TrainState,
    base: Params,
    loader: Any,
    options: Options,
    *,
    eval_loader: Callable[[], Iterable] | None = None,
    checkpointer: checkpoint_lib.Checkpointer | None = None,
    writers: Callable[[int], list[metrics_lib.Writer]] | None = None,
    learning_rate: Callable[[Any], Any] | None = None,
    on_eval: Callable[[TrainState, int], dict[str, float]] | None = None,
) -> Result:
    """Trains until ``options`` or the data say stop; a run that has a checkpoint goes on from there.

    Args:
      step, state, base: from `step.make_step` and `state.start`; ``state`` is donated.
      loader: iterator of batches of this process's rows, as many on every process (asking at each step would make
        the host wait); its get_state / set_state make resuming exact.
      options: when things happen.
      eval_loader: makes a fresh, finite loader for each evaluation.
      checkpointer: where to save and to resume from; None: nowhere.
      writers: (step to resume after) -> where metrics go.
      learning_rate: (update) -> rate, to log it.
      on_eval: more to measure at each evaluation: (state, step) -> numbers by name, "eval_" put before each.

    Raises:
      TunejaxError: ``max_nonfinite_steps`` updates in a row were skipped; the last checkpoint is as it was.
    """
    run = _Run(step, state, base, loader, options, eval_loader, checkpointer, learning_rate, on_eval)
    run.resume()
    run.writers = writers(run.at) if writers else []
    try:
        with (
            signals.StopWish() as wish,
            progress_lib.Progress(options.max_steps, run.at, shown=options.progress) as bar,
        ):
            run.bar = bar
            run.go(wish)
    finally:
        for writer in run.writers:
            writer.close()
        if checkpointer is not None:
            checkpointer.wait()
    result = run.result
    result.state, result.step = run.state, run.at
    return result


class _Run:
    """What `fit` keeps while it goes."""

    def __init__(
        self, step: Steps, state: TrainState, base: Params, loader: Any, options: Options, eval_loader: Any,
        checkpointer: Any, learning_rate: Any, on_eval: Any,
    ) -> None:  # fmt: skip
        self.step, self.state, self.base, self.loader, self.options = step, state, base, loader, options
        self.eval_loader, self.checkpointer = eval_loader, checkpointer
        self.learning_rate, self.on_eval = learning_rate, on_eval
        self.frozen = step.objective.frozen
        self.result = Result(state)
        self.meter, self.bar = metrics_lib.Meter(), progress_lib.Progress(None, shown=False)
        self.writers: list[metrics_lib.Writer] = []
        self.at, self.bad_evals, self.evaluated_at, self.evaluated = 0, 0, -1, 0.0
        self.shapes: set[tuple[int, ...]] = set()

    def resume(self) -> None:
        """Takes up the last checkpoint, if there is one."""
        if self.checkpointer is None or self.checkpointer.latest() is None:
            return
        found = self.checkpointer.restore(self.state)
        self.state = found.state
        self.loader.set_state(found.data)
        self.at = self.result.resumed_from = int(found.state.step)
        self.bad_evals = found.loop["bad_evals"]
        self.result.best, self.result.best_step = found.loop["best"], found.loop["best_step"]
        timed = found.loop.get("seconds", 0.0), found.loop.get("tokens", 0)
        self.result.watch, self.result.memory = metrics_lib.Stopwatch(*timed), found.loop.get("memory")

    def go(self, wish: signals.StopWish) -> None:
        """Steps until there is a reason to stop, then logs, evaluates and saves a last time."""
        batches = iter(self.loader)
        self.go_on()
        while not (reason := self.reason_to_stop(wish)):
            batch = next(batches, None)
            if batch is None:
                reason = "data"
                break
            self.one(batch)
            if self.due(self.options.logging_steps):
                self.log()
            if self.due(self.options.eval_steps):
                self.evaluate()
            if self.due(self.options.save_steps) and self.at != self.options.max_steps:
                self.halt()
                self.save()  # the last step is saved once it is evaluated
                self.go_on()
        self.result.stopped = reason
        self.log()
        finished = reason in ("max_steps", "data", "early")
        if finished and self.at > self.result.resumed_from:
            self.evaluate()
        self.halt()
        self.save()

    def reason_to_stop(self, wish: signals.StopWish) -> str:
        """Why to stop before the next step, or ""."""
        patience = self.options.early_stopping_patience
        if patience is not None and self.bad_evals >= patience:
            return "early"
        if self.options.max_steps is not None and self.at >= self.options.max_steps:
            return "max_steps"
        # Several processes agree only where they meet anyway, so that none waits for the others at each step.
        if (jax.process_count() == 1 or self.due(self.options.logging_steps)) and wish.agreed():
            return wish.received or "SIGTERM"
        return ""

    def due(self, every: int | None) -> bool:
        """Whether something that happens ``every`` steps happens after this one."""
        return every is not None and self.at > 0 and self.at % every == 0

    def one(self, batch: dict[str, np.ndarray]) -> None:
        """One step; returns before the device has done it."""
        tokens = int(np.count_nonzero(batch["segment_ids"])) * jax.process_count()
        new = batch["tokens"].shape not in self.shapes
        if new:
            self.halt()  # compiling is no part of the speed
        placed = self.step.put(batch)
        self.state, metrics = self.step(self.state, self.base, self.frozen, placed)
        self.at += 1
        self.meter.add(metrics, tokens)
        if new:
            self.shapes.add(batch["tokens"].shape)
            used = self.step.memory(self.state, self.base, self.frozen, placed)
            self.result.memory = max(filter(None, (self.result.memory, used)), default=None)
            self.halt()
            self.go_on()
        else:
            self.result.watch.tokens += tokens
        self.meter.wait()
        self.bar.step(self.at)

    def halt(self) -> None:
        """Waits for the device, and stops the watch."""
        jax.block_until_ready(self.state.step)
        self.result.watch.stop()

    def go_on(self) -> None:
        """Starts the clocks again: what happened since they stopped is no training."""
        self.meter.restart_clock()
        self.result.watch.go()

    def log(self) -> None:
        """Fetches and writes the means since the last time.

        Raises:
          TunejaxError: too many updates in a row were skipped.
        """
        values = self.meter.read()
        if not values:
            return
        if self.learning_rate is not None:
            updates = self.at - int(self.state.nonfinite[1])
            values["learning_rate"] = float(self.learning_rate(max(updates - 1, 0)))
        self.write({**values, "train_seconds": self.result.watch.seconds})
        limit = self.options.max_nonfinite_steps
        if values["nonfinite"] >= limit:
            saved = self.checkpointer.latest() if self.checkpointer else None
            kept = f"The checkpoint of step {saved} is good. " if saved is not None else ""
            raise errors.TunejaxError(
                f"stopped at step {self.at}: {int(values['nonfinite'])} steps in a row had a loss or gradient that is "
                f"not finite (the limit is {limit}); none of them changed the weights. {kept}Usual causes: a "
                "learning rate that is too high, no warm-up, bad rows. Try a lower learning rate or clip gradients."
            )

    def write(self, values: dict[str, float]) -> None:
        """To the history, the writers and the bar."""
        self.result.history.append({"step": self.at, **values})
        for writer in self.writers:
            writer.write(self.at, values)
        self.bar.report(self.at, values)

    def evaluate(self) -> None:
        """Once a step at most: measures, compares with the best, and saves a new best."""
        if self.eval_loader is None or self.evaluated_at == self.at:
            return
        self.halt()
        begun = time.perf_counter()
        values = evaluate(self.step, self.state, self.base, self.eval_loader())
        extra = self.on_eval(self.state, self.at) if self.on_eval else {}
        values = {f"eval_{k}": v for k, v in {**values, **extra}.items()}
        timed = {"eval_seconds": time.perf_counter() - begun, "train_seconds": self.result.watch.seconds}
        self.write({**values, **timed})
        name = self.options.best_metric
        if name not in values:
            raise errors.ConfigError(f"metric_for_best_model: no {name!r}. {errors.did_you_mean(name, values)}")
        self.evaluated_at, self.evaluated = self.at, values[name]
        if self.better(values[name]):
            self.result.best, self.result.best_step, self.bad_evals = values[name], self.at, 0
            self.save()
        else:
            self.bad_evals += 1
        self.go_on()

    def better(self, value: float) -> bool:
        """Whether ``value`` beats the best so far."""
        best, sign = self.result.best, 1 if self.options.higher_wins else -1
        if not math.isfinite(value):
            return False
        return best is None or sign * (value - best) > self.options.early_stopping_threshold

    def save(self) -> None:
        """Starts to write a checkpoint of this step, unless there is one."""
        if self.checkpointer is None or self.at == 0:
            return
        metric = self.evaluated if self.evaluated_at == self.at and math.isfinite(self.evaluated) else None
        result, watch = self.result, self.result.watch
        loop = {"bad_evals": self.bad_evals, "best": result.best, "best_step": result.best_step,
                "seconds": watch.seconds, "tokens": watch.tokens, "memory": result.memory}  # fmt: skip
        self.checkpointer.save(self.state, self.loader.get_state(), loop, best=metric)
