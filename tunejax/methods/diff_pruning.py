"""Diff pruning: a difference from the base whose entries are gated towards zero (Guo et al., 2021, arXiv:2012.07463).

    theta = theta0 + z * w,   z = min(1, max(0, s (r - l) + l)),   s = sigmoid(log u - log(1 - u) + alpha)

with u uniform in (0, 1) while training (hard-concrete gates, Louizos et al., 2018, arXiv:1712.01312) and 1/2 otherwise.
The expected number of open gates is differentiable and is the penalty: sum of sigmoid(alpha - log(-l / r)). After
``mask_steps`` updates the entries of greatest |z w| are kept, the others are zero from then on, and what is kept goes
on training without noise and penalty (the paper's magnitude pruning and fixed-mask tuning, section 3.2).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, sparse
from tunejax.core import method as methods
from tunejax.core.method import Axes, Context, Method, Start
from tunejax.core.paths import Params, Path

LOW, HIGH = -1.5, 1.5
"""l and r: gates are stretched to this interval before they are clipped to [0, 1]."""

ALIASES = {"layers_to_transform": "layers"}
"""What PEFT calls it -> what it is here."""


def diff_pruning(
    mask_steps: int,
    targets: str | list[str] = "/layers/**",
    density: float = 0.005,
    penalty: float = 1.25e-7,
    gate_init: float = 5.0,
    layers: str | int | None = None,
) -> Method:
    """Trains a sparse difference, each entry with a gate of its own.

    Args:
      mask_steps: updates until the mask is fixed.
      targets: globs over parameters.
      density: part of all their entries that the mask keeps.
      penalty: weight of the expected number of open gates in the loss.
      gate_init: alpha at the start; 5 opens nearly every gate.
      layers: only these layers of the stack, as a slice: "-2:". What lies outside the stack is then left out too.

    Raises:
      ConfigError: a density outside (0, 1], fewer than one step, a negative penalty.
      TargetError (from init): nothing matched, or a method before this one wraps what matched.
    """
    sparse.check("diff_pruning", density, mask_steps)
    if penalty < 0:
        raise errors.ConfigError(f"diff_pruning: penalty is {penalty}; it must be at least 0")

    def init(key: Any, params: Params) -> Start:
        w = sparse.zeros("diff_pruning", params, targets, layers)
        train = {p: {"w": x, "alpha": jnp.full_like(x, gate_init)} for p, x in w.items()}
        mask = {p: jnp.ones(x.shape, bool) for p, x in w.items()}
        return Start(train=train, state={"updates": jnp.zeros((), jnp.int32), "mask": mask})

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        fixed = state["updates"] >= mask_steps
        changes = {}
        for path, x in train.items():
            z = gate(x["alpha"])
            if ctx.train and ctx.key is not None:
                z = jnp.where(fixed, z, gate(x["alpha"], methods.path_key(ctx.key, path)))
            changes[path] = jnp.where(state["mask"][path], z * x["w"], 0.0)
        return sparse.added(params, changes)

    def update(train: Any, state: Any, grads: Any, ctx: Context) -> Any:
        def found(_: Any) -> Any:
            return sparse.greatest({p: jnp.abs(gate(x["alpha"]) * x["w"]) for p, x in train.items()}, density)

        updates = state["updates"] + 1
        mask = jax.lax.cond(updates == mask_steps, found, lambda _: state["mask"], None)
        return {"updates": updates, "mask": mask}

    def open_gates(train: Any, state: Any, ctx: Context) -> jax.Array:
        expected = sum(jnp.sum(jax.nn.sigmoid(x["alpha"] - math.log(-LOW / HIGH))) for x in train.values())
        return jnp.where(state["updates"] >= mask_steps, 0.0, penalty * expected)

    def axes(model_axes: Mapping[Path, Axes], train: Any) -> Any:
        return {p: {k: model_axes.get(p, (None,) * len(x.shape)) for k, x in both.items()} for p, both in train.items()}

    named = (targets,) if isinstance(targets, str) else tuple(targets)
    return methods.method(
        "diff_pruning",
        init,
        bind,
        update=update,
        penalty=open_gates,
        axes=axes,
        cuts=lambda depth: methods.layer_cuts(layers, depth),
        targets=named,
        updates=mask_steps,
        density=density,
    )


def gate(alpha: jax.Array, key: Any = None) -> jax.Array:
    """Hard-concrete gates in [0, 1] for log-odds ``alpha`` of any shape; without a key, at the median of the noise."""
    noise = 0.0 if key is None else jax.random.logistic(key, alpha.shape)
    return jnp.clip(jax.nn.sigmoid(noise + alpha) * (HIGH - LOW) + LOW, 0.0, 1.0)
