"""`tunejax validate CONFIG`: everything that can be checked without running anything."""

import argparse
from pathlib import Path

import jax

from tunejax.config import load, locate
from tunejax.core import errors, rates
from tunejax.core.model import key_shape
from tunejax.data import labels, rows
from tunejax.interop import tensors
from tunejax.methods import report
from tunejax.recipes import assemble, folder, latency, measured, members, runtime, settings


def main(args: argparse.Namespace) -> None:
    """Checks config, run folder, files, model headers and targets; prints the target report and the parameter table."""
    config = latency.resolved(load.load(args.config, args.overrides))
    folder.claim(config)
    check_files(config)
    runtime.begin()
    parts = parts_of(config)
    settings.batches(config, parts.mesh)
    labels.check_order(config.data.labels or (), parts.known)
    stored = tensors.open_folder(parts.folder)
    check_optimizer(config)
    if config.many:
        members.plan(members.configs_of(config))
    params = jax.eval_shape(parts.model.init, key_shape())
    start = jax.eval_shape(parts.method.init, key_shape(), params)
    measured.check_best(parts, measured.evaluated(parts))  # some mistakes show in a forward pass alone
    print(f"model    {parts.name}: {parts.model_config.family}, {len(stored)} tensors in {parts.folder}")
    print(f"mesh     {dict(parts.mesh.shape)} on {jax.devices()[0].device_kind}")
    print(f"method   {parts.method.name}")
    print(report.describe(parts.method, params, start).text())
    print(rates.counts(parts.method, params, start).text())
    print("valid: nothing was run or written")


def parts_of(config: load.schema.Config) -> assemble.Parts:
    """What the config names, built without its rows. Raises TunejaxError where it does not fit."""
    weights = (config.objective.model_extra or {}).get("class_weights")
    # The rows, which are not read, may have more classes than the two that nothing else says.
    unsaid = not config.data.labels and config.model.num_labels is None
    count = len(weights) if unsaid and isinstance(weights, list) else None
    return assemble.parts(config, assemble.opened(config), num_labels=count)


def check_optimizer(config: load.schema.Config) -> None:
    """Raises ConfigError on an optimiser or schedule that does not fit, before the rows are read."""
    # How many steps an epoch has is not known before that.
    settings.optimizer(config, total_steps=config.train.max_steps or max(1000, config.train.warmup_steps))


def check_files(config: load.schema.Config) -> None:
    """Raises ConfigError naming every local data file that is not there, with the nearest one that is."""
    problems = []
    named = [(f"data.path.{i}", s.path) for i, s in enumerate(config.data.path)]
    for key, text in [*named, *([("data.eval_path", config.data.eval_path)] if config.data.eval_path else [])]:
        located = locate.locate(text)
        path = Path(located)
        if not path.exists() and rows.is_glob(located):
            problems += _unmatched(key, path)
        elif not path.exists() and not rows.is_hub_id(located):
            near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            problems.append(f"{key}: no file {path}. {errors.did_you_mean(path.name, near)}".strip())
    if problems:
        raise errors.ConfigError("\n  ".join(problems))


def _unmatched(key: str, pattern: Path) -> list[str]:
    try:
        rows.matching(pattern)
    except errors.DataError as e:
        return [f"{key}: {e}"]
    return []
