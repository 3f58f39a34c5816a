"""Adapters on top of each other: trained ones, frozen, below a new one (Pfeiffer et al., 2020, arXiv:2005.00052).

    h_0 = x W + b        h_i = h_{i-1} + adapter_i(h_{i-1})

That is MAD-X (section 3): adapters of languages are trained by masked language modelling, and one of a task above the
frozen one of its language, ``method: [{name: adapter_stack, adapters: [runs/language]}, {name: pfeiffer}]``. Below the
trained one of the task then goes any other language's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import activations, joins, paths, taken
from tunejax.core import method as methods
from tunejax.core.bottleneck import Bottleneck
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

LOADED = {"adapters": lambda state: apart(state)}
"""Arguments that a config gives as folders of finished runs, whose adapters the recipe reads -> how a run's own state
gives them, when these folders may be gone."""

AGREE = {"activation": None, "scale": None, "reads": None}
"""What the runs in those folders must have been trained with: what this method's argument of that name is."""


def adapter_stack(adapters: list[Any], activation: str = "relu", scale: float = 1.0, reads: str = "branch") -> Method:
    """Trains nothing: puts trained adapters, frozen, on each other and below what comes after (arXiv:2005.00052).

    They need not stand at the same kernels, nor in the same layers, nor be of one width. Adapters that differ in the
    other arguments stand in several of these, one after another.

    Args:
      adapters: what each trained (`taken.Adapter`), the lowest first; in a config, folders of finished runs. Of a run
        that itself stands on a stack, what it trained alone.
      activation, scale, reads: those that all of them were trained with. Folders are checked for that.

    Raises:
      ConfigError: no adapter, one that is no bottleneck adapter, an unknown activation or ``reads``.
      TargetError (from init): the model has no kernel at some site, one of another width, or too few layers.
    """
    activations.named(activation)
    taken.check("adapter_stack", adapters, 1, "one adapter at least")
    adapters = [taken.joined(a) for a in adapters]
    floors = {str(i): joins.reading(_floor(a, activation, scale), reads) for i, a in enumerate(adapters)}

    def init(key: Any, params: Params) -> Start:
        state = {}
        for i, floor in floors.items():
            state[i] = floor.init(key, params).train
            params = floor.bind(params, state[i], {}, Context())
        return Start(state=state)

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        for i, floor in floors.items():
            params = floor.bind(params, state[i], {}, ctx)
        return params

    named = taken.targets(adapters)
    return methods.method("adapter_stack", init, bind, cuts=taken.cuts(adapters), targets=named)


def _floor(adapter: taken.Adapter, activation: str, scale: float) -> Method:
    """One adapter as a method that would train it: what keeps its arrays keeps them where nothing trains."""

    def init(key: Any, params: Params) -> Start:
        return Start(train=jax.tree.map(jnp.asarray, taken.at_segments("adapter_stack", adapter, params)))

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        wrapped = {
            p: Bottleneck(paths.get(params, p), **arrays, activation=activation, scale=scale)
            for p, arrays in train.items()
        }
        return paths.replace(params, wrapped)

    return methods.method("adapter_stack", init, bind)


def apart(state: Mapping[str, taken.Adapter]) -> list[taken.Adapter]:
    """The adapters of a state of this method, the lowest first."""
    return [state[i] for i in sorted(state, key=int)]
