"""What a model was and what is left of it: sizes, latency and quality, as numbers, a table and a picture."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax import plots
from tunejax.core import errors, masked, paths
from tunejax.core.model import Model, full_batch
from tunejax.models import build, cost
from tunejax.models.config import ModelConfig
from tunejax.recipes import artefact, assemble, evaluate, teacher

REPEATS = 10
"""Forward passes of which the median is the latency."""
SIDES = ("whole", "masked", "cut")
"""What quality is told of."""


def random_batch(config: ModelConfig, rows: int, length: int) -> dict[str, jax.Array]:
    """Rows of random tokens. Raises ConfigError where the model does not take them."""
    if rows < 1 or not 1 <= length <= config.max_positions:
        raise errors.ConfigError(
            f"--batch {rows} --length {length}: at least one row of 1 to {config.max_positions} tokens"
        )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length))
    return full_batch(jnp.asarray(tokens, jnp.int32))


def logits(models: Sequence[tuple[Model, paths.Params]], batch: Any) -> list[tuple[jax.Array, float]]:
    """Logits of a batch by each model, and the median milliseconds that they take once compiled.

    The models take turns, so that what else the machine does slows all of them alike.
    """
    runs = [(jax.jit(lambda p, b, m=m: m.logits(m.head(p), m.hidden(p, b)[0])), params) for m, params in models]
    outs: list[jax.Array] = [jax.block_until_ready(run(params, batch)) for run, params in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS):
        for (run, params), own in zip(runs, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(params, batch))
            own.append(1000 * (time.perf_counter() - start))
    return [(out, statistics.median(own)) for out, own in zip(outs, times, strict=True)]


def built(config: ModelConfig, params: paths.Params, head: str, dtype: Any) -> tuple[Model, paths.Params]:
    """The model of parameters, in the segments that they have, and they."""
    cuts = tuple(s.start for s in paths.segments(params))
    return build.build(config, head=head, cuts=cuts, dtype=dtype), params


def sizes(config: ModelConfig, head: str, length: int, latency: float) -> dict[str, Any]:
    """What a model costs, in rows of ``length`` tokens. latency: in milliseconds, see `logits`."""
    return {
        "parameters": cost.parameters(config, head),
        "flops_per_token": cost.forward_flops(config, head, length),
        "latency_ms": latency,
    }


def quality(tuned: artefact.Tuned, bound: paths.Params, checkpoint: Path) -> dict[str, Any]:
    """The scores on data.eval_path of the whole network, of the masked one, and of the checkpoint that was cut.

    The whole network is the run's teacher; without one that can be asked, the largest size of a run that offers
    several, and else the base, untuned.

    Args:
      tuned: the run.
      bound: its parameters with the masks in place.
      checkpoint: folder of the cut model.

    Returns:
      {"of": what the whole network is, "rows": how many, and for each of `SIDES` its scores by name}; empty where the
      run has no rows to evaluate on.
    """
    parts = tuned.parts
    if not parts.config.data.eval_path:
        return {}
    name, model, params = _whole(tuned, bound)
    found = {
        "whole": scores(parts, model, params),
        "masked": scores(parts, parts.model, bound),
        "cut": cut_scores(parts, checkpoint),
    }
    rows = [found[side].pop("rows") for side in SIDES]
    return {"of": name, "rows": rows[-1], **found}


def scores(parts: assemble.Parts, model: Model, params: paths.Params) -> dict[str, Any]:
    """The scores of a model on the held-out rows of a run, as the run's own evaluation has them."""
    return evaluate.scores(parts._replace(model=model, method=artefact.NOTHING), params)


def cut_scores(parts: assemble.Parts, checkpoint: Path) -> dict[str, Any]:
    """`scores` of a checkpoint, as it is read from its files."""
    named = {"path": str(checkpoint), "layers": None, "random_init": False, "tokenizer": None}
    config = parts.config.model_copy(update={"model": parts.config.model.model_copy(update=named)})
    read = assemble.opened(config, artefact.NOTHING)
    own = assemble.parts(config, read, num_labels=parts.model_config.num_labels, mesh=parts.mesh)
    return evaluate.scores(own, assemble.load(own).params)


def _whole(tuned: artefact.Tuned, bound: paths.Params) -> tuple[str, Model, paths.Params]:
    """(what it is called, model, parameters)."""
    parts, section = tuned.parts, tuned.parts.config.distill
    base = (f"{parts.name}, untuned", parts.model, tuned.loaded.params)
    if masked.counts(tuned.state):
        base = ("the run's largest size", parts.model, masked.taken_off(bound))
    # A teacher that reads by another tokenizer has no score on these rows.
    if section is None or section.teacher in (None, teacher.ITSELF) or section.divergence == "uld":
        return base
    try:
        (model, params), _ = teacher.opened(parts, parts.config.data.labels or ())
    except errors.TunejaxError as e:
        print(f"warning: the whole network is {base[0]}, as the teacher cannot be opened: {e}")
        return base
    return f"{teacher.place(str(section.teacher))}, the teacher", model, params


def table(report: Mapping[str, Any]) -> str:
    """Before, after and their ratio in plain text; then quality, and what is kept."""
    before, after, kept = report["before"], report["after"], report["kept"]
    lines = [f"{'':<16}{'before':>14}{'after':>14}{'':>14}{'ratio':>9}"]
    lines += [_line(name, old, after[name], None, _ratio(old, after[name])) for name, old in before.items()]
    found = report["quality"]
    if found:
        lines += ["", f"{'quality':<16}{'whole':>14}{'masked':>14}{'cut':>14}{'of whole':>9}"]
        for name, old in found["whole"].items():
            before_cut, cut = found["masked"].get(name), found["cut"].get(name)
            share = _ratio(old, cut)
            lines.append(_line(name, old, before_cut, cut, None if share is None else 100 * share, "%"))
        lines.append(f"on {found['rows']} held-out rows; whole: {found['of']}")
    return "\n".join([*lines, "", *(f"{name:<16}{count:>14} kept" for name, count in kept.items())])


def _line(name: str, *values: Any) -> str:
    *numbers, share, unit = values if isinstance(values[-1], str) else (*values, "")
    cells = "".join(f"{_number(x):>14}" for x in numbers)
    text = "-" if share is None else f"{share:.1f}{unit}" if unit else f"{share:.3f}"
    return f"{name:<16}{cells}{text:>9}"


def _number(x: Any) -> str:
    return "" if x is None else f"{x:,.4f}" if isinstance(x, float) else f"{x:,}"


def _ratio(old: Any, new: Any) -> float | None:
    return new / old if old and new is not None and np.isfinite(old) and np.isfinite(new) else None


def picture(report: Mapping[str, Any], path: Path) -> None:
    """What is left of each number, as bars, a PNG."""
    bars = [(name, old, report["after"][name]) for name, old in report["before"].items()]
    found = report["quality"]
    bars += [(name, old, found["cut"].get(name)) for name, old in found.get("whole", {}).items()]
    shares = [(f"{n}: {_number(a)} to {_number(b)}", r) for n, a, b in bars if (r := _ratio(a, b)) is not None]
    plots.shares(shares, path, title=f"{report['name']}, {report['method']}")
