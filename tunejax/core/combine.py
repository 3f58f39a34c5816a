"""Several trained changes made one: weighted sums, TIES and DARE, as pure functions of arrays.

Task arithmetic (Ilharco et al., 2023, arXiv:2212.04089) adds weighted changes; a negative weight takes a task away.
TIES (Yadav et al., 2023, arXiv:2306.01708) keeps the largest entries of each change, elects a sign for every entry and
averages those that agree with it. DARE (Yu et al., 2024, arXiv:2311.03099) drops entries at random and scales up the
rest. Names and the order of the steps are those of HF PEFT's ``add_weighted_adapter``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tunejax.core import errors


class How(NamedTuple):
    """prune: which entries of each change stay: None (all), "largest" or "random". elect: TIES's signs and mean."""

    prune: str | None
    elect: bool


HOWS = {
    "linear": How(None, False),
    "magnitude_prune": How("largest", False),
    "ties": How("largest", True),
    "dare_linear": How("random", False),
    "dare_ties": How("random", True),
}
"""Name -> what is done with the changes before they are added."""


def combine(
    changes: Sequence[jax.Array],
    weights: Sequence[float],
    how: str = "linear",
    *,
    density: float = 1.0,
    key: Any = None,
    each: bool = False,
) -> jax.Array:
    """One change of several of a shape.

    Args:
      changes: arrays of one shape.
      weights: a factor for each.
      how: of `HOWS`.
      density: the share of entries that pruning keeps.
      key: PRNG key of the entries that "random" keeps; change i draws from ``fold_in(key, i)``.
      each: the first axis counts layers, and each is pruned by itself.

    Raises:
      ConfigError: an unknown name, shapes that differ, not one weight for each, a density outside (0, 1], no key.
    """
    check(how, len(changes), weights, density)
    if len({x.shape for x in changes}) > 1:
        raise errors.ConfigError(f"{how} adds arrays of one shape; found {[tuple(x.shape) for x in changes]}")
    prune, elect = HOWS[how]
    if prune == "random" and key is None:
        raise errors.ConfigError(f"{how} drops entries at random: give a key")
    kept = [jnp.asarray(x) for x in changes]
    if prune == "largest":
        kept = [jax.vmap(lambda y: largest(y, density))(x) if each else largest(x, density) for x in kept]
    if prune == "random":
        kept = [scaled_up(x, drawn(jax.random.fold_in(key, i), x.shape, density), density) for i, x in enumerate(kept)]
    stacked, factors = jnp.stack(kept), jnp.asarray(weights, jnp.float32)
    weighted = stacked * factors.reshape(-1, *(1,) * (stacked.ndim - 1))
    if not elect:
        return weighted.sum(0)
    agreeing = elected(stacked)
    return jnp.where(agreeing, weighted, 0).sum(0) / jnp.maximum(agreeing.sum(0), 1)


def check(how: str, count: int, weights: Sequence[float], density: float) -> None:
    """Raises ConfigError: an unknown name, not one weight for each change, a density outside (0, 1]."""
    if how not in HOWS:
        raise errors.ConfigError(f"no way to combine is called {how!r}. {errors.did_you_mean(how, HOWS)}")
    if len(weights) != count or not count:
        raise errors.ConfigError(f"{len(weights)} weights for {count} changes; give one for each")
    if not 0 < density <= 1:
        raise errors.ConfigError(f"density is {density}; it is the share of entries that stay, above 0 and at most 1")


def largest(x: jax.Array, density: float) -> jax.Array:
    """``x`` with its int(density · size) entries of greatest magnitude, and zero elsewhere (TIES's trim)."""
    flat = x.reshape(-1)
    _, places = jax.lax.top_k(jnp.abs(flat), int(density * flat.size))
    return jnp.zeros_like(flat).at[places].set(flat[places]).reshape(x.shape)


def drawn(key: Any, shape: tuple[int, ...], density: float) -> jax.Array:
    """Bool of this shape: the entries that DARE keeps."""
    return jax.random.bernoulli(key, density, (math.prod(shape),)).reshape(shape)


def scaled_up(x: jax.Array, kept: jax.Array, density: float) -> jax.Array:
    """The kept entries divided by ``density``, so that the mean over draws is ``x`` (DARE, equation 2)."""
    return jnp.where(kept, x / density, 0)


def elected(changes: jax.Array) -> jax.Array:
    """Bool [changes, ...]: where each change [changes, ...] has the sign of the sum of all (+ where that is 0)."""
    return jnp.sign(changes) == jnp.where(changes.sum(0) >= 0, 1, -1)


class Factors(NamedTuple):
    """A change of a kernel: a · b, the scale within. a [..., in, rank]; b [..., rank, out]."""

    a: jax.Array
    b: jax.Array


class Product(NamedTuple):
    """A method whose change of each kernel is scale · a b, for what works on several such changes at once.

    A method's module calls it ``PRODUCT``; it holds for all methods of the module.

    factors: (arrays of a site by name, of train and state) -> its factors, without the scale.
    scale:   (every argument of the method) -> the scale.
    scaled:  the arrays that the change is proportional to: multiplied by c, they multiply it by c.
    varies:  arguments that change nothing but ranks and the scale.
    plain:   (rank) -> the description of the method that keeps a product of this rank, with scale 1, as "a" and "b".
    """

    factors: Callable[[Mapping[str, Any]], Factors]
    scale: Callable[[Mapping[str, Any]], float]
    scaled: tuple[str, ...]
    varies: tuple[str, ...]
    plain: Callable[[int], dict[str, Any]]


def stacked_ranks(parts: Sequence[Factors], weights: Sequence[float], rank: int | None = None) -> Factors:
    """The weighted sum of products as one product, exactly: their ranks side by side, zeros up to ``rank``."""
    a = jnp.concatenate([w * p.a for p, w in zip(parts, weights, strict=True)], axis=-1)
    b = jnp.concatenate([p.b for p in parts], axis=-2)
    return widened(Factors(a, b), a.shape[-1] if rank is None else rank)


def widened(factors: Factors, rank: int) -> Factors:
    """The same product with zeros up to ``rank``."""
    return Factors(padded(factors.a, -1, rank), padded(factors.b, -2, rank))


def padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """``x`` with zeros at the end of an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def combined_factors(
    parts: Sequence[Factors],
    scales: Sequence[float],
    weights: Sequence[float],
    how: str,
    *,
    density: float = 1.0,
    key: Any = None,
    each: bool = False,
) -> Factors:
    """What PEFT does with LoRA: A's and B's combined apart, each weighted by the root of weight · scale.

    The product of sums is not the sum of products: it has cross terms. `stacked_ranks` has none.

    Args:
      parts: factors of one rank, without their scales.
      scales: of each product.
      others: as of `combine`.

    Raises:
      ConfigError: as `combine`.
    """
    roots = [math.sqrt(abs(w * s)) for w, s in zip(weights, scales, strict=True)]
    signed = [math.copysign(r, w * s) for r, w, s in zip(roots, weights, scales, strict=True)]
    keys = (None, None) if key is None else jax.random.split(key)
    a = combine([p.a for p in parts], signed, how, density=density, key=keys[0], each=each)
    b = combine([p.b for p in parts], roots, how, density=density, key=keys[1], each=each)
    return Factors(a, b)


def truncated(change: jax.Array, rank: int) -> Factors:
    """The nearest product of ``rank`` to a change [..., in, out]: its leading singular triplets, as PEFT's "svd"."""
    u, s, vt = jnp.linalg.svd(change, full_matrices=False)
    return widened(Factors(u[..., :rank], s[..., :rank, None] * vt[..., :rank, :]), rank)
