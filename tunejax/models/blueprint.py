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
    traced: list[Any] = []

    def init(key: Any) -> Params:
        graphdef, state = nnx.split(make(nnx.Rngs(params=key)))
        traced.append((graphdef, state))
        return nnx.to_pure_dict(state)

    with jax.ensure_compile_time_eval():
        key = jax.random.key(0)
    jax.eval_shape(init, key)
    graphdef, template = traced.pop()

    def fresh(key: Any) -> Params:
        try:
            return init(key)
        finally:
            traced.clear()

    def merge(params: Params) -> M:
        # A copy, since replace_by_pure_dict writes into the state that it is given.
        state = jax.tree.map(lambda v: v, template, is_leaf=lambda v: isinstance(v, nnx.Variable))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    return Blueprint(fresh, merge)
