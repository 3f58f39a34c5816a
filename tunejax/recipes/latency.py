"""A budget of latency: what part of each dimension a run may keep, measured on its device before it begins.

A method is a pure function of parameters, so it cannot measure. A method's argument ``latency: 0.5`` beside a list
``keep`` therefore becomes parts in ``keep`` here; the run's config.yaml has both, and a resumed run measures nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.config import load, schema
from tunejax.core import errors, gradual
from tunejax.models import build, cut
from tunejax.models.config import ModelConfig
from tunejax.recipes import assemble, before_after, runtime

PARTS = (1.0, 0.75, 0.5, 0.25)
"""Of each dimension, at which latency is measured."""
ROWS, LENGTH = 8, 64
"""Of the batch, unless the method's ``length`` says otherwise."""


def resolved(config: schema.Config) -> schema.Config:
    """``config`` with parts in place of budgets of latency: as the run folder has them, or measured now.

    Raises:
      ConfigError: several processes, or a budget below what a quarter of each dimension takes.
    """
    if not pending(config):
        return config
    specs = config.method if isinstance(config.method, list) else [config.method]
    file = Path(config.output_dir) / "config.yaml"
    before: Any = load.load(file).method if file.is_file() else []
    before = before if isinstance(before, list) else [before]
    found = [_known(s, before[i : i + 1]) or _measured(config, s) if _open(s) else s for i, s in enumerate(specs)]
    return config.model_copy(update={"method": found if isinstance(config.method, list) else found[0]})


def pending(config: schema.Config) -> bool:
    """Whether a budget of latency stands in it that is not turned into parts yet."""
    return any(_open(s) for s in (config.method if isinstance(config.method, list) else [config.method]))


def _open(spec: dict[str, Any]) -> bool:
    """Whether a method has a budget, and no parts yet."""
    return spec.get("latency") is not None and not isinstance(spec.get("keep"), dict)


def _known(spec: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any] | None:
    """``spec`` with the parts that its run folder has for the same budget, if it does."""
    for old in before:
        keep = old.get("keep")
        same = {k: v for k, v in old.items() if k != "keep"} == {k: v for k, v in spec.items() if k != "keep"}
        if same and isinstance(keep, dict) and sorted(keep) == sorted(_dimensions(spec)):
            return {**spec, "keep": keep}
    return None


def _dimensions(spec: dict[str, Any]) -> list[str]:
    return list(spec.get("keep") or ["mlp"])


def _measured(config: schema.Config, spec: dict[str, Any]) -> dict[str, Any]:
    runtime.begin()
    if jax.process_count() > 1:
        raise errors.ConfigError("latency is measured in one process; give keep, as a run in one process has found it")
    shape = assemble.opened(config).model_config
    head, dtype = config.model.head or "lm", jnp.dtype(config.model.dtype)
    sizes, dimensions = cut.sizes(shape), _dimensions(spec)
    counts = spec.get("kv_head_counts", list(cut.head_counts(shape, head)))
    allowed = None if "hidden" in dimensions else counts
    writable = None if counts is None else cut.writable(shape, head)

    def kept(part: float) -> dict[str, int]:
        return gradual.fitted(part, dimensions, sizes, allowed, writable) or {}

    length = min(spec.get("length", LENGTH), shape.max_positions)
    parts = [p for p in PARTS if kept(p)]  # of small models a quarter may be less than the format can say
    times = milliseconds([cut.smaller(shape, kept(p)) for p in parts], head, dtype, length)
    part = largest(parts, [t / times[0] for t in times], spec["latency"])
    keep = {name: count / sizes[name] for name, count in kept(part).items()}
    print(f"latency of {', '.join(f'{p:g}: {t:.3f} ms' for p, t in zip(parts, times, strict=True))}; keep: {keep}")
    return {**spec, "keep": keep}


def milliseconds(configs: Sequence[ModelConfig], head: str, dtype: Any, length: int) -> list[float]:
    """Median times of a forward pass of models of random weights."""
    models = [build.build(c, head=head, dtype=dtype) for c in configs]
    drawn = [(m, jax.jit(m.init)(jax.random.key(0))) for m in models]
    batch = before_after.random_batch(configs[0], ROWS, length)
    return [time for _, time in before_after.logits(drawn, batch)]


def largest(parts: Any, ratios: Any, budget: float) -> float:
    """The largest part whose latency is within the budget, on lines between what was measured.

    Args:
      parts: descending, of the dimensions.
      ratios: latency at each, relative to the whole. A larger model counts as at least as slow as a smaller one.

    Raises:
      ConfigError: the smallest part is slower.
    """
    rising = np.maximum.accumulate(np.asarray(ratios)[::-1])
    for thousandths in range(1000, round(1000 * parts[-1]) - 1, -1):
        if np.interp(thousandths / 1000, parts[::-1], rising) <= budget:
            return thousandths / 1000
    raise errors.ConfigError(
        f"latency is to be {budget} of the whole model's, and with {parts[-1]} of each dimension it is {ratios[-1]:.3f}"
    )
