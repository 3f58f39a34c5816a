"""`tunejax shrink RUN OUTPUT`: the smaller model that a run's masks leave, for transformers, with what it saves."""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import errors, masked, paths
from tunejax.core.model import full_batch
from tunejax.interop import hf
from tunejax.models import build, cost, cut
from tunejax.models.config import ModelConfig
from tunejax.recipes import artefact, folder, runtime

REPEATS = 10
"""Forward passes of which the median is the latency."""


def main(args: argparse.Namespace) -> None:
    """Cuts, compares with the masked model, writes, and prints what there was before and what is left.

    Raises:
      ConfigError: the output folder holds something, the run masks nothing, or the family cannot say the sizes.
      NotLinear: an operator has no plain kernel.
    """
    output = folder.new(args.output)
    runtime.begin()
    tuned = artefact.open_run(args.run, args.overrides)
    parts, config = tuned.parts, tuned.parts.model_config
    head, dtype = parts.config.model.head or "lm", jnp.dtype(parts.config.model.dtype)
    bound = tuned.params
    masks = cut.masks(bound, config)
    if not masks:
        raise errors.ConfigError(
            f"{args.run} masks nothing: its method is {parts.method.name}; chain shrink after it, or use tunejax export"
        )
    whole = cut.bare(bound)
    small, smaller = cut.cut(whole, masks, config, masked.scores(tuned.state))
    cut.check(smaller, head)

    batch = _batch(config, args)
    expected, _ = _logits(parts.model, bound, batch)
    before, after = (_measured(c, p, head, dtype, batch) for c, p in ((config, whole), (smaller, small)))
    off = float(np.abs(np.asarray(after.pop("logits") - expected, np.float32)).max())
    before.pop("logits")
    hf.save(output, small, smaller, head=head, dtype=args.dtype, tokenizer_from=artefact.tokenizer_folder(parts))
    kept = {name: f"{int(mask[0].sum())} of {mask.shape[1]}" for name, mask in masks.items()}
    folder.write_json(output / "shrink.json", {"before": before, "after": after, "kept": kept, "difference": off})
    print("\n".join(_table(before, after, kept)))
    print(f"logits differ from the masked model's by at most {off:.1e} ({dtype.name})")
    print(f"{output}: {parts.name} shrunk by {parts.method.name}")


def _batch(config: ModelConfig, args: argparse.Namespace) -> dict[str, jax.Array]:
    """Rows of random tokens."""
    if args.batch < 1 or not 1 <= args.length <= config.max_positions:
        raise errors.ConfigError(
            f"--batch {args.batch} --length {args.length}: at least one row of 1 to {config.max_positions} tokens"
        )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (args.batch, args.length))
    return full_batch(jnp.asarray(tokens, jnp.int32))


def _logits(model: Any, params: paths.Params, batch: Any) -> tuple[jax.Array, float]:
    """Logits of a batch, and the median milliseconds that they take once compiled."""
    run = jax.jit(lambda p, b: model.logits(model.head(p), model.hidden(p, b)[0]))
    out, times = jax.block_until_ready(run(params, batch)), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(params, batch))
        times.append(1000 * (time.perf_counter() - start))
    return out, statistics.median(times)


def _measured(config: ModelConfig, params: paths.Params, head: str, dtype: Any, batch: Any) -> dict[str, Any]:
    cuts = tuple(s.start for s in paths.segments(params))
    logits, latency = _logits(build.build(config, head=head, cuts=cuts, dtype=dtype), params, batch)
    return {
        "parameters": cost.parameters(config, head),
        "flops_per_token": cost.forward_flops(config, head, batch["tokens"].shape[1]),
        "latency_ms": latency,
        "logits": logits,
    }


def _table(before: dict[str, Any], after: dict[str, Any], kept: dict[str, str]) -> list[str]:
    """The table in plain text, right-aligned."""
    lines = [f"{'':<16}{'before':>14}{'after':>14}{'ratio':>8}"]
    for name, old in before.items():
        form = ".3f" if isinstance(old, float) else ","
        lines.append(f"{name:<16}{old:>14{form}}{after[name]:>14{form}}{after[name] / old:>8.3f}")
    return [*lines, *(f"{name:<16}{count:>14}" for name, count in kept.items())]
