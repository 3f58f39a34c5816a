"""Progressive shrinking: a pretrained network loses its least important units by masks while it is tuned, until what is
left is the target; then `tunejax shrink` cuts the arrays. (The idea is that of Once-for-All: Cai et al., 2020,
arXiv:1908.09791. There stages train a network whose parts all serve; here one size comes out.)

When: `core.gradual`; and "loss_gated": left = 1 - p, where p moves on only while the moving average of the loss is at
most ``max_loss``. Where it stays above for ``patience`` masks in a row, those of the last good size come back, to stay.

Of each row (`core.units`) the units that score highest are kept; with a mask m = 1 on each, a unit's score is

    taylor:     the moving average of abs(dL/dm), which is abs(Σ w dL/dw) over what reads it   (arXiv:1905.10650)
    movement:   the sum of -dL/dm over steps: units grow that the loss wants stronger          (arXiv:2005.07683)
    activation: the moving average of the mean square of what it gives                         (arXiv:2407.14679)
    magnitude:  the sum of squares of its weights, as they are

Scores of masked units are measured too, so that they may come back while the schedule runs. The gradient by m is that
by a probe in ``train`` that is always 0: its learning rate is multiplied by 0.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, gradual, masked, units
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

GATED = "loss_gated"
IMPORTANCE = ("taylor", "movement", "activation", "magnitude")
FACTS = ("num_kv_heads", "kv_head_counts", "writable")
"""Arguments that follow from the model, where a config builds the method."""

ALIASES = {"begin_step": "begin", "frequency": "every"}
"""What other pruning tools call it -> what it is here."""

SCALES = {"taylor": masked.PROBE, "movement": masked.PROBE, "activation": masked.PROBE**2, "magnitude": 0.0}


def shrink(
    keep: dict[str, float] | list[str] | None = None,
    parameters: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    length: int = 64,
    steps: int = 1000,
    begin: int = 0,
    every: int = 10,
    schedule: str = "cubic",
    stages: int = 2,
    max_loss: float | None = None,
    patience: int = 5,
    importance: str = "taylor",
    beta: float = 0.9,
    num_kv_heads: int | None = None,
    kv_head_counts: list[int] | None = None,
    writable: Callable[[Mapping[str, int]], bool] | None = None,
) -> Method:
    """Masks ever more heads, MLP entries, layers or hidden entries while the methods before it train.

    It trains nothing itself, and stands last in its chain, so that what the others add is masked too.

    Args:
      keep: dimension (heads, mlp, depth, hidden) -> the part of its units to keep; half of the MLP unless told. With
        ``parameters``, ``flops`` or ``latency``, a list of dimensions that all keep the same part, as great as may be.
      parameters: the part of the model's parameters to keep.
      flops: the part of a forward pass's FLOPs a token to keep, in rows of ``length`` tokens.
      latency: the part of a forward pass's time to keep. A run measures it when it begins, and puts parts in ``keep``.
      length: see ``flops``.
      steps: updates from the first mask to the last.
      begin: updates before it, in which importance is gathered.
      every: updates between masks.
      schedule: cubic, stages, one_shot or loss_gated.
      stages: of each dimension, in "stages"; these go in the order of ``keep``.
      max_loss, patience: of "loss_gated": the training loss to stay under, and how many masks to wait for it.
      importance: taylor, movement, activation (no depth) or magnitude.
      beta: of the moving averages.
      num_kv_heads: of the model; a unit of "heads" is one with the query heads that read it.
      kv_head_counts: how many its format can say; any, and any other sizes, unless told.
      writable: (units of heads and hidden) -> whether it can say them; a budget takes only such.

    Raises:
      ConfigError: an argument out of range; from init: a target that the model or its format does not allow.
    """
    dimensions = {"mlp": 0.5} if keep is None else dict.fromkeys(keep, 1.0) if isinstance(keep, list) else dict(keep)
    plan = gradual.Plan(schedule, steps, begin, every, stages)
    units.check(dimensions, "shrink: keep")
    problems = _keep_problems(dimensions, keep, {"parameters": parameters, "flops": flops, "latency": latency})
    problems += [*plan.problems((*gradual.SCHEDULES, GATED)), *_score_problems(dimensions, importance, beta)]
    problems += [f"length is {length}; it must be at least 1"] if length < 1 else []
    if (schedule == GATED) != (max_loss is not None) or patience < 1:
        problems.append("loss_gated needs max_loss and a patience of at least 1, and no other schedule takes max_loss")
    if "heads" in dimensions and num_kv_heads is None:
        problems.append("to shrink heads, give num_kv_heads of the model (a config's run knows it)")
    if problems:
        raise errors.ConfigError("shrink: " + "; ".join(problems))
    order = {name: i for i, name in enumerate(dimensions)}

    def init(key: Any, params: Params) -> Start:
        sizes = units.sizes(params, num_kv_heads)
        # Where hidden is cut too, heads of the same part may fit: who cuts will tell.
        target = targets(params, sizes, None if "hidden" in order else kv_head_counts)
        zeros = {name: jnp.zeros((units.rows(params, name), sizes[name])) for name in dimensions}
        state = {
            "updates": jnp.zeros((), jnp.int32),
            masked.TARGET: {name: jnp.full((), t, jnp.int32) for name, t in target.items()},
            "kept": {name: jnp.ones(x.shape, bool) for name, x in zeros.items()},
            masked.SCORES: {name: jnp.zeros_like(x) for name, x in zeros.items()},
        }
        if schedule == GATED:
            good = {name: jnp.ones(x.shape, bool) for name, x in zeros.items()}
            counters = {name: jnp.zeros((), jnp.int32) for name in ("moved", "waited")}
            state["gate"] = {"good": good, "loss": jnp.zeros(()), **counters}
        return Start(train={} if importance == "magnitude" else {"probe": zeros}, state=state)

    def targets(params: Params, sizes: Any, allowed: Any) -> dict[str, int]:
        """How many units of each dimension are left at the end, in a row."""
        if latency is not None and not isinstance(keep, dict):
            raise errors.ConfigError(
                "shrink: latency is measured on the device when train, compare or shrink begins; elsewhere give keep"
            )
        if parameters is None and flops is None:
            return gradual.counts(dimensions, sizes, allowed)

        def cost(kept: Mapping[str, int]) -> int:
            if flops is None:
                return units.parameters(params, kept, sizes)
            return units.flops(params, kept, sizes, length)

        whole, most = cost({}), float((parameters if flops is None else flops) or 1)
        asked = None if kv_head_counts is None else writable
        return gradual.greatest_counts(order, sizes, allowed, lambda kept: cost(kept) / whole, most, asked)

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        masks = {name: kept.astype(jnp.float32) for name, kept in state["kept"].items()}
        probes = {name: SCALES[importance] * x for name, x in train.get("probe", {}).items()} if ctx.train else {}
        if importance == "activation":
            return masked.put(params, masks, probes)
        return masked.put(params, {name: m + probes[name] if probes else m for name, m in masks.items()})

    def update(train: Any, state: Any, grads: Any, ctx: Context) -> Any:
        updates = state["updates"] + 1
        moves, left = plan.moves(updates), plan.left(updates, len(order))
        gate: dict[str, Any] = {}
        if schedule == GATED:
            moves, left, gate = gated(plan, state, updates, ctx.loss)
        if importance == "magnitude":
            scores = jax.lax.cond(moves, lambda: _magnitudes(ctx, state), lambda: state[masked.SCORES])
        else:
            slopes = {name: g / SCALES[importance] for name, g in grads["probe"].items()}
            scores = {name: _gathered(importance, beta, state[masked.SCORES][name], g) for name, g in slopes.items()}
        kept = {}
        for name, old in state["kept"].items():
            count = gradual.count(old.shape[1], state[masked.TARGET][name], left[order[name]])
            kept[name] = jnp.where(moves, gradual.greatest(scores[name], count), old)
            if gate:
                kept[name] = jnp.where(gate["waited"] >= patience, gate["good"][name], kept[name])
        target = state[masked.TARGET]
        if gate:  # where the gate has closed, what the loss allowed is the end
            closed = gate["waited"] >= patience
            target = {name: jnp.where(closed, kept[name][0].sum(), n) for name, n in target.items()}
        new = {"updates": updates, masked.TARGET: target, "kept": kept, masked.SCORES: scores}
        return {**new, "gate": gate} if gate else new

    def gated(plan: gradual.Plan, state: Any, updates: Any, loss: Any) -> tuple[Any, list[Any], dict[str, Any]]:
        """(whether masks are made, what is left, the gate's state) where the loss decides."""
        if loss is None:
            raise errors.ConfigError("shrink: loss_gated needs the loss of the step, which its caller does not give")
        old = state["gate"]
        loss = jnp.where(updates == 1, loss, beta * old["loss"] + (1 - beta) * loss)
        asked = (updates > begin) & ((updates - begin) % every == 0) & (old["waited"] < patience)
        good = asked & (loss <= max_loss)
        moves = good & (old["moved"] * every < steps)
        moved = old["moved"] + moves
        waited = jnp.where(good, 0, old["waited"] + asked)
        masks = {name: jnp.where(good, kept, old["good"][name]) for name, kept in state["kept"].items()}
        left = gradual.remaining(GATED, moved * every / steps, len(order))
        return moves, left, {"good": masks, "loss": loss, "moved": moved, "waited": waited}

    def no_rates(train: Any) -> Any:
        return jax.tree.map(lambda x: 0.0, train)

    # The gate asks at every ``every``-th update alone.
    ends = begin + math.ceil(steps / every) * every if schedule == GATED else plan.ends
    return methods.method("shrink", init, bind, update=update, rates=no_rates, updates=ends)


def _gathered(importance: str, beta: float, old: jax.Array, slope: jax.Array) -> jax.Array:
    if importance == "movement":
        return old - slope
    return beta * old + (1 - beta) * jnp.abs(slope)


def _magnitudes(ctx: Context, state: Any) -> dict[str, jax.Array]:
    if ctx.params is None:
        raise errors.ConfigError("shrink: magnitude needs the parameters of the step, which its caller does not give")
    params = masked.taken_off(ctx.params())
    return {name: units.squares(params, name, old.shape[1]) for name, old in state[masked.SCORES].items()}


def _keep_problems(keep: Mapping[str, float], asked: Any, budgets: Mapping[str, float | None]) -> list[str]:
    problems = [f"keep[{k}] is {v}; it must lie in (0, 1]" for k, v in keep.items() if not 0 < v <= 1]
    given = {k: v for k, v in budgets.items() if v is not None}
    measured = list(given) == ["latency"] and isinstance(asked, dict)
    if not keep or (asked is not None and isinstance(asked, list) != bool(given) and not measured):
        problems.append(
            f"give keep as parts by dimension, or as a list of dimensions together with {' or '.join(budgets)}"
        )
    if len(given) > 1:
        problems.append(f"give one of {', '.join(given)}")
    return problems + [f"{k} is {v}; it must lie in (0, 1]" for k, v in given.items() if not 0 < v <= 1]


def _score_problems(keep: Mapping[str, float], importance: str, beta: float) -> list[str]:
    problems = []
    if importance not in IMPORTANCE:
        problems.append(f"importance is {importance!r}. {errors.did_you_mean(importance, IMPORTANCE)}")
    if not 0 <= beta < 1:
        problems.append(f"beta is {beta}; it must lie in [0, 1)")
    if importance == "activation" and "depth" in keep:
        problems.append("a layer has no activation of its own; rank depth by taylor, movement or magnitude")
    return problems
