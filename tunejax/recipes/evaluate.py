"""`tunejax evaluate RUN|CONFIG`: loss, perplexity, accuracy and exact match on the held-out rows."""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tunejax.config import load
from tunejax.core import errors, paths
from tunejax.recipes import artefact, assemble, folder, measured, rows, runtime, samples, settings
from tunejax.train import state, step


def main(args: argparse.Namespace) -> None:
    """Prints the numbers as JSON. A run folder is evaluated tuned, a config as its base model, untuned."""
    runtime.begin()
    if artefact.is_run(args.run):
        tuned = artefact.open_run(args.run, args.overrides)
    elif Path(args.run).is_dir():
        folder.find(args.run)  # raises, with the nearest run
        return
    else:
        config = load.load(args.run, args.overrides)
        opened = assemble.opened(config)
        tuned = artefact.open_base(rows.with_labels(config, opened.known), opened)
    found = scores(tuned.parts, tuned.base, tuned.train, tuned.state)
    print(json.dumps(found, indent=2))
    if args.output:
        folder.write_json(Path(args.output), found)


def scores(parts: assemble.Parts, base: paths.Params, train: Any = None, method_state: Any = None) -> dict[str, Any]:
    """The scores of an opened model on data.eval_path, and "rows", how many; exact match may be of fewer.

    Raises:
      ConfigError: there are no rows.

    train, method_state: of the parts' method; empty unless given.
    """
    return judge(parts)(base, train or {}, method_state or {})


def judge(parts: assemble.Parts) -> Callable[[paths.Params, Any, Any], dict[str, Any]]:
    """(base, train, state) of the parts' method -> `scores`; the rows are read and the program compiled once."""
    config = parts.config
    if not config.data.eval_path:
        raise errors.ConfigError("no rows to evaluate on: set data.eval_path")
    held_out = rows.read_held_out(config, parts.tokenizer, parts.model_config.kind, parts.prompt, parts.known)
    measured.check_classes(parts, held_out)
    measured.check_match(parts, held_out)
    sizes = settings.batches(config, parts.mesh)
    one = step.make_step(parts.model, parts.method, parts.objective, optax.identity(), mesh=parts.mesh)
    batches = rows.evaluation_batches(config, held_out, sizes, parts.tokenizer)
    asks = samples.Judge(parts, one, held_out, batches)

    def measure(base: paths.Params, train: Any, method_state: Any) -> dict[str, Any]:
        zero, key = jnp.zeros((), jnp.int32), jax.random.key(0)
        now = state.TrainState(zero, train, method_state, (), key, jnp.zeros(2, jnp.int32))
        with tempfile.TemporaryDirectory() as scratch:
            found = {**asks(now, base, Path(scratch), "now"), "rows": len(held_out.held_out or ())}
        if "exact_match" in found:
            found["exact_match_rows"] = min(found["rows"], config.evaluation.max_rows)
        return found

    return measure
