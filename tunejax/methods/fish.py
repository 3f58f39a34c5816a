"""FISH mask: the entries with the most Fisher information train, the others never do (Sung et al., 2021,
arXiv:2111.09839).

    F_i = mean over samples of (d loss / d theta_i)^2 at the pretrained parameters        (equation 6 there)

The samples are the batches of the first ``mask_steps`` updates: squares of batch gradients, where the paper squares
those of single examples, and after `train.max_grad_norm` has cut them (null: never). While they are gathered the
parameters stand still; then the mask is fixed and training begins.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import method as methods
from tunejax.core import sparse
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

ALIASES = {"keep_ratio": "density", "layers_to_transform": "layers"}
"""What the paper's code and PEFT call it -> what it is here."""


def fish(
    targets: str | list[str] = "**",
    density: float = 0.005,
    mask_steps: int = 32,
    layers: str | int | None = None,
) -> Method:
    """Trains the entries of greatest Fisher information.

    Args:
      targets: globs over parameters.
      density: part of all their entries that trains.
      mask_steps: updates whose gradients are gathered first, without a change of the parameters.
      layers: only these layers of the stack, as a slice: "-2:". What lies outside the stack is then left out too.

    Raises:
      ConfigError: a density outside (0, 1], fewer than one step.
      TargetError (from init): nothing matched, or a method before this one wraps what matched.
    """
    sparse.check("fish", density, mask_steps)

    def init(key: Any, params: Params) -> Start:
        train = sparse.zeros("fish", params, targets, layers)
        return Start(train=train, state={**sparse.fresh(train), "fisher": jax.tree.map(jnp.zeros_like, train)})

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        return sparse.added(params, sparse.difference(train, state))

    def update(train: Any, state: Any, grads: Any, ctx: Context) -> Any:
        updates = state["updates"] + 1
        gathering = updates <= mask_steps
        # The optimiser has moved ``train``; an origin that moves along keeps the parameters where they were.
        origin = jax.tree.map(lambda x, old: jnp.where(gathering, x, old), train, state["origin"])
        fisher = jax.tree.map(lambda f, g: jnp.where(gathering, f + g**2 / mask_steps, f), state["fisher"], grads)
        found = updates == mask_steps
        mask = jax.lax.cond(found, lambda f: sparse.greatest(f, density), lambda f: state["mask"], fisher)
        return {"updates": updates, "mask": mask, "origin": origin, "fisher": fisher}

    named = (targets,) if isinstance(targets, str) else tuple(targets)
    return methods.method(
        "fish",
        init,
        bind,
        update=update,
        cuts=lambda depth: methods.layer_cuts(layers, depth),
        targets=named,
        updates=mask_steps + 1,
        density=density,
    )
