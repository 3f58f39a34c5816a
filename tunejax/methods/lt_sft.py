"""Lottery-ticket sparse fine-tuning: the entries that full tuning moved farthest train again, from the start (Ansell et
al., 2022, arXiv:2110.07560, section 3.1).

Phase one tunes everything for ``mask_steps`` updates. Then the entries of greatest |theta - theta0| make the mask, all
go back to theta0, and phase two tunes the mask's alone. (The paper begins its learning-rate schedule anew with phase
two; here one schedule spans both.)
"""

from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, sparse
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

ALIASES = {"ft_params_proportion": "density", "full_l1_reg": "l1", "layers_to_transform": "layers"}
"""What the paper's code and PEFT call it -> what it is here."""


def lt_sft(
    mask_steps: int,
    targets: str | list[str] = "**",
    density: float = 0.05,
    l1: float = 0.0,
    layers: str | int | None = None,
) -> Method:
    """Trains the entries that full tuning moves most.

    Args:
      mask_steps: updates of the first phase; several with Adam, whose first step moves every entry equally far.
      targets: globs over parameters.
      density: part of all their entries that trains in the second phase.
      l1: weight of the mean of |theta - theta0| over all targeted entries, added to the loss in both phases.
      layers: only these layers of the stack, as a slice: "-2:". What lies outside the stack is then left out too.

    Raises:
      ConfigError: a density outside (0, 1], fewer than one step, a negative ``l1``.
      TargetError (from init): nothing matched, or a method before this one wraps what matched.
    """
    sparse.check("lt_sft", density, mask_steps)
    if l1 < 0:
        raise errors.ConfigError(f"lt_sft: l1 is {l1}; it must be at least 0")

    def init(key: Any, params: Params) -> Start:
        train = sparse.zeros("lt_sft", params, targets, layers)
        return Start(train=train, state=sparse.fresh(train))

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        return sparse.added(params, sparse.difference(train, state))

    def update(train: Any, state: Any, grads: Any, ctx: Context) -> Any:
        def rewound(_: Any) -> Any:
            return sparse.greatest({p: jnp.abs(x) for p, x in train.items()}, density), dict(train)

        updates = state["updates"] + 1
        kept = (state["mask"], state["origin"])
        mask, origin = jax.lax.cond(updates == mask_steps, rewound, lambda _: kept, None)
        return {"updates": updates, "mask": mask, "origin": origin}

    def penalty(train: Any, state: Any, ctx: Context) -> jax.Array:
        changes = sparse.difference(train, state)
        total = sum(jnp.sum(jnp.abs(d)) for d in changes.values())
        return jnp.asarray(l1 * total / sum(d.size for d in changes.values()))

    named = (targets,) if isinstance(targets, str) else tuple(targets)
    return methods.method(
        "lt_sft",
        init,
        bind,
        update=update,
        penalty=penalty if l1 else None,
        cuts=lambda depth: methods.layer_cuts(layers, depth),
        targets=named,
        updates=mask_steps + 1,
        density=density,
    )
