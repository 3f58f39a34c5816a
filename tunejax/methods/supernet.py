"""One network, many sizes: every step trains another of its nested sub-networks, so that afterwards each may be cut out
as it is (Once-for-All: Cai et al., 2020, arXiv:1908.09791; turns after the sandwich rule: Yu and Huang, 2019,
arXiv:1903.05134).

    size 0 is the whole network, size n - 1 keeps ``keep``, and those between lie on a line:
    kept(i) = all - i / (n - 1) · (all - keep · all), rounded

Of three micro-batches in turn the first goes through the whole network, the second through the smallest, the third
through one between, at random (with ``mixed``, of each dimension another, so that mixtures train too, as the paper's
sampling has it). With three of them a step, each step trains all three, as the sandwich rule has it; what
they saw is not the same rows, though. Units are ranked once, by the magnitude that they have at the start, so
a smaller size is a part of every larger one.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, gradual, masked, units
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

FACTS = ("num_kv_heads", "kv_head_counts")
"""Arguments that follow from the model, where a config builds the method."""


def supernet(
    keep: dict[str, float] | None = None,
    sizes: int = 5,
    size: int | dict[str, int] = 0,
    mixed: bool = False,
    num_kv_heads: int | None = None,
    kv_head_counts: list[int] | None = None,
) -> Method:
    """Masks the network down to another of several nested sizes in each step, while the methods before it train.

    It trains nothing itself, and stands last in its chain.

    Args:
      keep: dimension (heads, mlp, depth, hidden) -> the part of its units that the smallest size keeps; half of the MLP
        unless told.
      sizes: how many.
      size: the one that evaluation, generation and the cut see; 0 is the whole network. By dimension, a mixture: of
        what it does not name, all is kept. May change after the run.
      mixed: whether the third of the turns draws the size of each dimension by itself, from all sizes.
      num_kv_heads: of the model; a unit of "heads" is one with the query heads that read it.
      kv_head_counts: how many its format can say; any unless told.

    Raises:
      ConfigError: an argument out of range.
    """
    least = {"mlp": 0.5} if keep is None else dict(keep)
    units.check(least, "supernet: keep")
    problems = [f"keep[{k}] is {v}; it must lie in (0, 1]" for k, v in least.items() if not 0 < v <= 1]
    chosen = size if isinstance(size, dict) else dict.fromkeys(least, size)
    units.check(chosen, "supernet: size")
    if not least or sizes < 2 or not all(name in least and 0 <= i < sizes for name, i in chosen.items()):
        problems.append(
            f"sizes is {sizes} and size {size}: there are at least 2, from 0 to {sizes - 1}, of {', '.join(least)}"
        )
    if "heads" in least and num_kv_heads is None:
        problems.append("to shrink heads, give num_kv_heads of the model (a config's run knows it)")
    if problems:
        raise errors.ConfigError("supernet: " + "; ".join(problems))

    def init(key: Any, params: Params) -> Start:
        every = units.sizes(params, num_kv_heads)
        counts: dict[str, jax.Array] = {}
        for name, part in least.items():
            wanted = [round(every[name] * (1 - i / (sizes - 1) * (1 - part))) for i in range(sizes)]
            allowed = kv_head_counts if name == "heads" and "hidden" not in least else None
            counts[name] = jnp.asarray([gradual.fitting(max(1, c), allowed) for c in wanted], jnp.int32)
        scores = {name: units.squares(params, name, every[name]) for name in least}
        return Start(state={masked.SCORES: scores, masked.COUNTS: counts})

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        masks = {}
        for name, x in state[masked.SCORES].items():
            own = name if mixed else ""
            at = chosen.get(name, 0) if not ctx.train or ctx.key is None else sampled(ctx, sizes, own)
            masks[name] = gradual.greatest(x, state[masked.COUNTS][name][at]).astype(jnp.float32)
        return masked.put(params, masks)

    return methods.method("supernet", init, bind)


def sampled(ctx: Context, sizes: int, dimension: str = "") -> jax.Array:
    """The size of a micro-batch: by its turn the whole network, the smallest, or one between.

    dimension: where each has a size of its own, which; then "between" is any.
    """
    turn, key = jnp.asarray(ctx.turn) % 3, methods.path_key(ctx.key, f"size{dimension}")
    low, high = (0, sizes) if dimension else (min(1, sizes - 2), max(sizes - 1, 1))
    drawn = jax.random.randint(key, (), low, high)
    return jnp.where(turn == 0, 0, jnp.where(turn == 1, sizes - 1, drawn))
