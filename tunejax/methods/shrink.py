"""Progressive shrinking: a pretrained network loses its least important units by masks while it is tuned, until what is
left is the target; then `tunejax shrink` cuts the arrays. (The idea is that of Once-for-All: Cai et al., 2020,
arXiv:1908.09791. There stages train a network whose parts all serve; here one size comes out.)

    kept(t) = target + (all - target) · left(p)        p: the part of the schedule that is over

        cubic:    left = (1 - p)³                                        (Zhu and Gupta, 2017, arXiv:1710.01878, eq. 1)
        stages:   one dimension after another, each down in equal steps  (the order of Once-for-All)
        one_shot: left = 0 from the first step on

Of each row (`core.units`) the units that score highest are kept; with a mask m = 1 on each, a unit's score is

        taylor:     the moving average of abs(dL/dm), which is abs(Σ w dL/dw) over what reads it   (arXiv:1905.10650)
        movement:   the sum of -dL/dm over steps: units grow that the loss wants stronger          (arXiv:2005.07683)
        activation: the moving average of the mean square of what it gives                         (arXiv:2407.14679)
        magnitude:  the sum of squares of its weights, as they are

Scores of masked units are measured too, so that they may come back while the schedule runs. The gradient by m is that
by a probe in ``train`` that is always 0: its learning rate is multiplied by 0.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, masked, units
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

SCHEDULES = ("cubic", "stages", "one_shot")
IMPORTANCE = ("taylor", "movement", "activation", "magnitude")
FACTS = ("num_kv_heads", "kv_head_counts")
"""Arguments that follow from the model, where a config builds the method."""

ALIASES = {"begin_step": "begin", "frequency": "every"}
"""What other pruning tools call it -> what it is here."""

SCALES = {"taylor": masked.PROBE, "movement": masked.PROBE, "activation": masked.PROBE**2, "magnitude": 0.0}


def shrink(
    keep: dict[str, float] | list[str] | None = None,
    parameters: float | None = None,
    steps: int = 1000,
    begin: int = 0,
    every: int = 10,
    schedule: str = "cubic",
    stages: int = 2,
    importance: str = "taylor",
    beta: float = 0.9,
    num_kv_heads: int | None = None,
    kv_head_counts: list[int] | None = None,
) -> Method:
    """Masks ever more heads, MLP entries, layers or hidden entries while the methods before it train.

    It trains nothing itself, and stands last in its chain, so that what the others add is masked too.

    Args:
      keep: dimension (heads, mlp, depth, hidden) -> the part of its units to keep; half of the MLP unless told. With
        ``parameters``, a list of dimensions that all keep the same part, as great as may be.
      parameters: the part of the model's parameters to keep.
      steps: updates from the first mask to the last.
      begin: updates before it, in which importance is gathered.
      every: updates between masks.
      schedule: cubic, stages or one_shot.
      stages: of each dimension, in "stages"; these go in the order of ``keep``.
      importance: taylor, movement, activation (no depth) or magnitude.
      beta: of the moving averages.
      num_kv_heads: of the model; a unit of "heads" is one with the query heads that read it.
      kv_head_counts: how many its format can say; any unless told.

    Raises:
      ConfigError: an argument out of range; from init: a target that the model or its format does not allow.
    """
    dimensions = {"mlp": 0.5} if keep is None else dict.fromkeys(keep, 1.0) if isinstance(keep, list) else dict(keep)
    fits = keep is None or isinstance(keep, list) == (parameters is not None)
    _check(dimensions, fits, parameters, steps, begin, every, schedule, stages, importance, beta)
    if "heads" in dimensions and num_kv_heads is None:
        raise errors.ConfigError("shrink: to shrink heads, give num_kv_heads of the model (a config's run knows it)")
    if schedule == "one_shot":
        steps = every = 1
    counts = kv_head_counts if "hidden" not in dimensions else None

    def init(key: Any, params: Params) -> Start:
        every_unit = units.sizes(params, num_kv_heads)
        target = _targets(params, dimensions, parameters, every_unit, counts)
        shapes = {name: (units.rows(params, name), every_unit[name]) for name in dimensions}
        zeros = {name: jnp.zeros(s) for name, s in shapes.items()}
        state = {
            "updates": jnp.zeros((), jnp.int32),
            "target": {name: jnp.full((), t, jnp.int32) for name, t in target.items()},
            "kept": {name: jnp.ones(s, bool) for name, s in shapes.items()},
            masked.SCORES: jax.tree.map(jnp.zeros_like, zeros),
        }
        return Start(train={} if importance == "magnitude" else {"probe": zeros}, state=state)

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        masks = {name: kept.astype(jnp.float32) for name, kept in state["kept"].items()}
        probes = {name: SCALES[importance] * x for name, x in train.get("probe", {}).items()} if ctx.train else {}
        if importance == "activation":
            return masked.put(params, masks, probes)
        return masked.put(params, {name: m + probes[name] if probes else m for name, m in masks.items()})

    def update(train: Any, state: Any, grads: Any, ctx: Context) -> Any:
        updates = state["updates"] + 1
        since = updates - begin
        moves = (since > 0) & (since <= steps) & ((since % every == 0) | (since == steps))
        left = remaining(schedule, jnp.clip(since / steps, 0.0, 1.0), len(dimensions), stages)
        if importance == "magnitude":
            found = jax.lax.cond(moves, lambda: _magnitudes(ctx, state), lambda: state[masked.SCORES])
        else:
            slopes = {name: g / SCALES[importance] for name, g in grads["probe"].items()}
            found = {name: _gathered(importance, beta, state[masked.SCORES][name], g) for name, g in slopes.items()}
        kept = {}
        for name, old in state["kept"].items():
            most, least = old.shape[1], state["target"][name]
            count = least + jnp.ceil((most - least) * left[order[name]]).astype(jnp.int32)
            kept[name] = jnp.where(moves, greatest(found[name], count), old)
        return {"updates": updates, "target": state["target"], "kept": kept, masked.SCORES: found}

    order = {name: i for i, name in enumerate(dimensions)}
    rates = lambda train: jax.tree.map(lambda x: 0.0, train)  # noqa: E731
    return methods.method("shrink", init, bind, update=update, rates=rates)


def remaining(schedule: str, position: Any, dimensions: int, stages: int) -> list[jax.Array]:
    """Of what each dimension is to lose, the part that it still has at ``position`` (0 to 1) of the schedule."""
    position = jnp.asarray(position, jnp.float32)
    if schedule == "stages":
        own = [jnp.clip(position * dimensions - i, 0.0, 1.0) for i in range(dimensions)]
        return [1.0 - jnp.ceil(p * stages) / stages for p in own]
    one = (1.0 - position) ** 3 if schedule == "cubic" else jnp.where(position > 0, 0.0, 1.0)
    return [one] * dimensions


def greatest(scores: jax.Array, count: Any) -> jax.Array:
    """Bool [rows, units]: the ``count`` highest of each row; of equals the first."""
    order = jnp.argsort(-scores, axis=1, stable=True)
    return jnp.argsort(order, axis=1) < count


def _gathered(importance: str, beta: float, old: jax.Array, slope: jax.Array) -> jax.Array:
    if importance == "movement":
        return old - slope
    return beta * old + (1 - beta) * jnp.abs(slope)


def _magnitudes(ctx: Context, state: Any) -> dict[str, jax.Array]:
    if ctx.params is None:
        raise errors.ConfigError("shrink: magnitude needs the parameters of the step, which its caller does not give")
    params = masked.taken_off(ctx.params())
    return {name: units.squares(params, name, old.shape[1]) for name, old in state[masked.SCORES].items()}


def _targets(
    params: Params,
    keep: Mapping[str, float],
    parameters: float | None,
    every_unit: Mapping[str, int],
    head_counts: list[int] | None,
) -> dict[str, int]:
    """How many units of each dimension are left at the end, in a row."""

    def counts(share: Mapping[str, float]) -> dict[str, int]:
        return {name: max(1, round(part * every_unit[name])) for name, part in share.items()}

    def allowed(wanted: dict[str, int]) -> dict[str, int]:
        if "heads" in wanted and head_counts:
            below = [c for c in head_counts if c <= wanted["heads"]]
            wanted["heads"] = max(below, default=min(head_counts))
        return wanted

    if parameters is None:
        wanted = counts(keep)
        if allowed(dict(wanted)) != wanted:
            raise errors.ConfigError(
                f"shrink: {wanted['heads']} of {every_unit['heads']} key/value heads cannot be written by the model's "
                f"format, which can say {head_counts}; keep such a part of heads, or cut hidden by the same part"
            )
        return wanted
    total = units.parameters(params, {}, every_unit)
    for thousandths in range(1000, -1, -1):
        wanted = allowed(counts(dict.fromkeys(keep, thousandths / 1000)))
        left = units.parameters(params, wanted, every_unit)
        if left <= parameters * total:
            return wanted
    raise errors.ConfigError(
        f"shrink: parameters is {parameters}, and with one unit each of {', '.join(keep)} {left / total:.3f} are left; "
        "shrink more dimensions"
    )


def _check(
    keep: Mapping[str, float], fits: bool, parameters: float | None, steps: int, begin: int, every: int,
    schedule: str, stages: int, importance: str, beta: float,
) -> None:  # fmt: skip
    units.check(keep, "shrink: keep")
    problems = [f"keep[{k}] is {v}; it must lie in (0, 1]" for k, v in keep.items() if not 0 < v <= 1]
    if not keep or not fits:
        problems.append("give keep as parts by dimension, or as a list of dimensions together with parameters")
    if parameters is not None and not 0 < parameters <= 1:
        problems.append(f"parameters is {parameters}; it must lie in (0, 1]")
    least = (("steps", steps, 1), ("every", every, 1), ("stages", stages, 1), ("begin", begin, 0))
    problems += [f"{name} is {value}; it must be at least {low}" for name, value, low in least if value < low]
    for name, value, choices in (("schedule", schedule, SCHEDULES), ("importance", importance, IMPORTANCE)):
        if value not in choices:
            problems.append(f"{name} is {value!r}. {errors.did_you_mean(value, choices)}")
    if not 0 <= beta < 1:
        problems.append(f"beta is {beta}; it must lie in [0, 1)")
    if importance == "activation" and "depth" in keep:
        problems.append("a layer has no activation of its own; rank depth by taylor, movement or magnitude")
    if problems:
        raise errors.ConfigError("shrink: " + "; ".join(problems))
