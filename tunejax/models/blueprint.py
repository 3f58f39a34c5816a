"""NNX modules as blueprints: a module is split once into its structure and a plain dict, and merged where it runs."""

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tunejax.core.paths import Params

M = TypeVar("M", bound=nnx.Module)
Noise = Callable[[tuple[int, ...]], jax.Array]
"""(shape) -> fresh standard normal float32 values, others at each call."""


class Blueprint(NamedTuple, Generic[M]):
    """The structure of a module without its values.

    init:  (key) -> a pure dict of fresh arrays; an empty slot is None.
    merge: (pure dict) -> the module holding these values: arrays, operators or None.
    """

    init: Callable[[Any], Params]
    merge: Callable[[Params], M]


def blueprint(make: Callable[[Noise], M], *, flat: bool = False) -> Blueprint[M]:
    """The blueprint of the module that ``make`` builds, found by tracing it: no array is allocated.

    Args:
      make: builds the module from a source of noise.
      flat: draw all of the module's noise at once and cut it up. Each draw costs about half a second of compilation,
        so a block is flat; what stands alone is not, so that one entry can be drawn without the others.
    """
    structure: list[Any] = []
    total = 0

    def trace(noise: Noise) -> Params:
        graphdef, state = nnx.split(make(noise))
        if not structure:
            # Slots without their values, which are tracers here.
            structure.extend([graphdef, jax.tree.map(lambda slot: slot.replace(None), state, is_leaf=_is_slot)])
        return nnx.to_pure_dict(state)

    def count(shape: tuple[int, ...]) -> jax.Array:
        nonlocal total
        total += math.prod(shape)
        return jnp.zeros(shape)

    jax.eval_shape(lambda: trace(count))
    graphdef, template = structure

    def init(key: Any) -> Params:
        return trace(_cut(jax.random.normal(key, (total,))) if flat else _draw(key))

    def merge(params: Params) -> M:
        # A copy, since replace_by_pure_dict writes into the state that it is given.
        state = jax.tree.map(lambda slot: slot, template, is_leaf=_is_slot)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    return Blueprint(init, merge)


def _is_slot(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _draw(key: Any) -> Noise:
    drawn = 0

    def noise(shape: tuple[int, ...]) -> jax.Array:
        nonlocal drawn
        drawn += 1
        return jax.random.normal(jax.random.fold_in(key, drawn), shape)

    return noise


def _cut(values: jax.Array) -> Noise:
    start = 0

    def noise(shape: tuple[int, ...]) -> jax.Array:
        nonlocal start
        start += math.prod(shape)
        return values[start - math.prod(shape) : start].reshape(shape)

    return noise
