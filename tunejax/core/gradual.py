"""Gradual pruning: when how much is masked, and to what end. What methods share that mask units or single weights.

kept(t) = target + ⌈(all - target) · left(p)⌉         p = (update - begin) / steps, clipped to [0, 1]

cubic:    left = (1 - p)³                                            (Zhu and Gupta, 2017, arXiv:1710.01878, eq. 1)
stages:   one dimension after another, each down in equal steps      (the order of Once-for-All, arXiv:1908.09791)
one_shot: left = 0 from the first update on
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import errors

SCHEDULES = ("cubic", "stages", "one_shot")


class Plan(NamedTuple):
    """When masks are made: every ``every`` updates after ``begin``, up to ``begin + steps``, and there."""

    schedule: str
    steps: int
    begin: int
    every: int
    stages: int = 1

    def moves(self, updates: Any) -> jax.Array:
        """Whether masks are made anew at this update (1 is the first)."""
        steps, every = (1, 1) if self.schedule == "one_shot" else (self.steps, self.every)
        since = updates - self.begin
        return (since > 0) & (since <= steps) & ((since % every == 0) | (since == steps))

    @property
    def ends(self) -> int:
        """The update at which the last masks are made."""
        return self.begin + (1 if self.schedule == "one_shot" else self.steps)

    def left(self, updates: Any, dimensions: int = 1) -> list[jax.Array]:
        """`remaining` at this update."""
        return remaining(self.schedule, (updates - self.begin) / self.steps, dimensions, self.stages)

    def problems(self, schedules: Sequence[str] = SCHEDULES) -> list[str]:
        """What is wrong with it, in words."""
        least = (
            ("steps", self.steps, 1),
            ("every", self.every, 1),
            ("stages", self.stages, 1),
            ("begin", self.begin, 0),
        )
        out = [f"{name} is {value}; it must be at least {low}" for name, value, low in least if value < low]
        if self.schedule not in schedules:
            out.append(f"schedule is {self.schedule!r}. {errors.did_you_mean(self.schedule, schedules)}")
        return out


def remaining(schedule: str, position: Any, dimensions: int = 1, stages: int = 1) -> list[jax.Array]:
    """Of what each dimension is to lose, the part that it still has at ``position`` (0 to 1) of the schedule."""
    position = jnp.clip(jnp.asarray(position, jnp.float32), 0.0, 1.0)
    if schedule == "stages":
        own = [jnp.clip(position * dimensions - i, 0.0, 1.0) for i in range(dimensions)]
        return [1.0 - jnp.ceil(p * stages) / stages for p in own]
    one = {"cubic": (1.0 - position) ** 3, "one_shot": jnp.where(position > 0, 0.0, 1.0)}.get(schedule, 1.0 - position)
    return [one] * dimensions


def count(most: int, least: Any, left: jax.Array) -> jax.Array:
    """int32: how many of ``most`` are kept on the way to ``least``."""
    return least + jnp.ceil((most - least) * left).astype(jnp.int32)


def greatest(scores: jax.Array, kept: Any) -> jax.Array:
    """Bool [..., n]: the ``kept`` highest along the last axis; of equals the first."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < kept


def fitting(count: int, allowed: Sequence[int] | None) -> int:
    """The greatest allowed number that is at most ``count``, or the least there is; ``count`` where any is allowed."""
    return max((c for c in allowed if c <= count), default=min(allowed)) if allowed else count


def counts(keep: Mapping[str, float], sizes: Mapping[str, int], head_counts: Sequence[int] | None) -> dict[str, int]:
    """How many units of each dimension (`core.units`) are left at the end, in a row, by the part of them to keep.

    Raises:
      ConfigError: a number of key/value heads that is not among ``head_counts`` (None: any).
    """
    wanted = _rounded(keep, sizes)
    if _allowed(wanted, head_counts) != wanted:
        raise errors.ConfigError(
            f"shrink: {wanted['heads']} of {sizes['heads']} key/value heads cannot be written by the model's "
            f"format, which can say {list(head_counts or ())}; keep such a part of heads, or cut hidden by the same"
        )
    return wanted


Writable = Callable[[Mapping[str, int]], bool]
"""(units of "heads" and "hidden", where these are cut) -> whether a model's format can say them."""


def fitted(
    part: float,
    dimensions: Iterable[str],
    sizes: Mapping[str, int],
    head_counts: Sequence[int] | None,
    writable: Writable | None,
) -> dict[str, int] | None:
    """`counts` of the same part of each dimension; where the format cannot say them, fewer.

    Heads by themselves are as `fitting` has them. With hidden entries, which depend on them, the most heads are taken
    for which there are entries enough, and of the entries the most that go with them; None where there are none.
    """
    wanted = _rounded(dict.fromkeys(dimensions, part), sizes)
    if writable is None or "hidden" not in wanted:
        return _allowed(wanted, head_counts)
    for heads in range(wanted.get("heads", 1), 0, -1):
        own = {"heads": heads} if "heads" in wanted else {}
        for hidden in range(wanted["hidden"], 0, -1):
            if writable({**own, "hidden": hidden}):
                return {**wanted, **own, "hidden": hidden}
    return None


def greatest_counts(
    dimensions: Iterable[str],
    sizes: Mapping[str, int],
    head_counts: Sequence[int] | None,
    left: Callable[[Mapping[str, int]], float],
    most: float,
    writable: Writable | None = None,
) -> dict[str, int]:
    """`fitted` of the greatest part of which ``left`` says at most ``most``.

    Raises:
      ConfigError: the fewest units are too many.
    """
    found = math.inf
    for thousandths in range(1000, -1, -1):
        wanted = fitted(thousandths / 1000, dimensions, sizes, head_counts, writable)
        if wanted is None:  # nor is there anything smaller
            break
        found = left(wanted)
        if found <= most:
            return wanted
    raise errors.ConfigError(
        f"shrink: a part of {most} is to be left, and with as few as can be written of {', '.join(dimensions)} "
        f"{found:.3f} are; shrink more dimensions, hidden together with heads"
    )


def _rounded(keep: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    return {name: max(1, round(part * sizes[name])) for name, part in keep.items()}


def _allowed(wanted: dict[str, int], head_counts: Sequence[int] | None) -> dict[str, int]:
    return {k: fitting(c, head_counts) if k == "heads" else c for k, c in wanted.items()}
