"""NNX modules as blueprints: a module is split once into its structure and a plain dict, and merged where it runs."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from flax import nnx

from tunejax.core.paths import Params

M = TypeVar("M", bound=nnx.Module)


class Blueprint(NamedTuple, Generic[M]):
    """The structure of a module without its values.

    init:  (key) -> a pure dict of fresh arrays; an empty slot is None.
    merge: (pure dict) -> the module holding these values: arrays, operators or None.
    """

    init: Callable[[Any], Params]
    merge: Callable[[Params], M]


def blueprint(make: Callable[[nnx.Rngs], M]) -> Blueprint[M]:
    """The blueprint of the module that ``make`` builds, found by tracing it: no array is allocated."""
    structure: list[Any] = []

    def is_slot(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    def init(key: Any) -> Params:
        graphdef, state = nnx.split(make(nnx.Rngs(params=key)))
        if not structure:
            # Slots without their values, which are tracers here.
            structure.extend([graphdef, jax.tree.map(lambda slot: slot.replace(None), state, is_leaf=is_slot)])
        return nnx.to_pure_dict(state)

    jax.eval_shape(init, jax.random.key(0))
    graphdef, template = structure

    def merge(params: Params) -> M:
        # A copy, since replace_by_pure_dict writes into the state that it is given.
        state = jax.tree.map(lambda slot: slot, template, is_leaf=is_slot)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    return Blueprint(init, merge)
