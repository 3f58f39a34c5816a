"""The numbers of a run that follow from the config together with the data and the devices."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from tunejax.config import schema
from tunejax.core import errors
from tunejax.core.method import Method
from tunejax.train import loop, schedule, sharding
from tunejax.train import optimizer as optimizers

DEFAULT_BATCH, DEFAULT_EPOCHS = 8, 3.0


class Batches(NamedTuple):
    """Rows of one optimiser step, micro-batches that it is cut into, and rows of one evaluation batch."""

    step: int
    accumulate: int
    evaluation: int


def batches(config: schema.Config, mesh: jax.sharding.Mesh) -> Batches:
    """Batch sizes on this mesh. Raises ConfigError where the rows do not divide over the devices."""
    train, shards = config.train, sharding.batch_shards(mesh)
    parts = train.gradient_accumulation_steps
    rows = train.train_batch_size or (train.per_device_train_batch_size or 0) * shards * parts
    rows = rows or math.ceil(DEFAULT_BATCH / (shards * parts)) * shards * parts
    if rows % (shards * parts):
        raise errors.ConfigError(
            f"train.train_batch_size is {rows}; it must be a multiple of {shards * parts} "
            f"(data x fsdp = {shards} devices, gradient_accumulation_steps = {parts})"
        )
    evaluation = train.eval_batch_size or rows // parts
    return Batches(rows, parts, math.ceil(evaluation / shards) * shards)


def total_steps(config: schema.Config, steps_of: Callable[[float], int]) -> int:
    """Optimiser steps of the run. steps_of: (epochs) -> steps."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return max(1, steps_of(config.train.num_train_epochs or DEFAULT_EPOCHS))


def cut_short(method: Method, total: int) -> str | None:
    """What is to be said where a run of ``total`` steps ends before the schedule of its method; None where not."""
    late = unfinished(method, total)
    advice = "its target is not reached; train longer or set fewer"
    return f"the run has {total} steps, and {late}: {advice}" if late else None


def unfinished(method: Method, step: int) -> str:
    """Which schedules of a method go on after ``step``, and until when; empty where none does."""
    late = {m.name: m.updates for m in method.parts or (method,) if m.updates > step}
    return ", ".join(f"{name} ends at update {updates}" for name, updates in late.items())


def optimizer(config: schema.Config, total_steps: int, learning_rate: Any = None) -> optimizers.Optimizer:
    """The optimiser with its schedule. Raises ConfigError on a name that it does not know.

    learning_rate: instead of the config's, a number or a traced scalar.
    """
    t = config.train
    rate = schedule.make_schedule(
        t.lr_scheduler_type,
        t.learning_rate if learning_rate is None else learning_rate,
        total_steps=total_steps,
        warmup_steps=t.warmup_steps,
        warmup_ratio=t.warmup_ratio,
        min_lr_ratio=t.min_lr_ratio,
    )
    return optimizers.make_optimizer(
        t.optim, rate, weight_decay=t.weight_decay, b1=t.adam_beta1, b2=t.adam_beta2, eps=t.adam_epsilon
    )


def loop_options(config: schema.Config, total_steps: int) -> loop.Options:
    """When to log, evaluate, save and stop."""
    t = config.train
    same = {k: getattr(t, k) for k in ("logging_steps", "eval_steps", "metric_for_best_model", "greater_is_better",
            "early_stopping_patience", "max_nonfinite_steps", "progress")}  # fmt: skip
    return loop.Options(max_steps=total_steps, save_steps=t.save_steps or max(1, math.ceil(total_steps / 10)), **same)


def keeps_best(config: schema.Config) -> bool:
    """Whether the run ends with the best checkpoint instead of the last."""
    wanted = config.train.load_best_model_at_end
    return bool(config.train.early_stopping_patience) if wanted is None else wanted
