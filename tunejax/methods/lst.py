"""Ladder side-tuning: a narrow network beside a frozen one (Sung et al., 2022, arXiv:2206.06522, section 3).

    s_i = block_i(μ_i h_i down_i + (1 - μ_i) s_{i-1})        μ_i = σ(α_i / 0.1), α_i = 0 at the start

The ladder reads what each block of the model gives and nothing of it goes back, so no gradient passes through the
model (`core.ladder` has all of it). Its blocks start as every r-th entry of the model's own along each of their axes;
in heads that are rotated these are the pairs of the narrow heads' own frequencies. The paper prunes by Fisher
information instead. Its last state norm(s_L) up replaces the model's; here s_L up, with up = 0, is added to it, so the
start is the identity.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from tunejax.core import errors, ladder, low_rank, operators, paths
from tunejax.core import method as methods
from tunejax.core.method import Axes, Context, Method, Start
from tunejax.core.paths import Params, Path

ALIASES = {"side_reduction_factor": "reduction_factor"}
"""What the paper's code calls it -> what it is here."""


def lst(reduction_factor: int = 8, temperature: float = 0.1) -> Method:
    """Trains a narrow stack that reads every block, and leaves the model out of the backward pass (arXiv:2206.06522).

    Args:
      reduction_factor: what each width of the model is divided by: its embedding, each head, its MLP.
      temperature: of the gates; the smaller, the faster they choose.

    Raises:
      ConfigError: a factor below 1, a temperature that is not positive; from init: the model's embedding or MLP is no
        multiple of the factor; where it runs: its heads are not.
      TargetError (from init): the model has no such slot, or another ladder stands there.
    """
    r = reduction_factor
    if r < 1 or not temperature > 0:
        raise errors.ConfigError(
            f"lst: reduction_factor is {r} and temperature {temperature}; they must be at least 1 and positive"
        )

    def init(key: Any, params: Params) -> Start:
        if ladder.SLOT not in params or params[ladder.SLOT] is not None:
            raise errors.TargetError(f"lst: no slot {ladder.SLOT!r} is empty; does another method fill it?")
        _check(params, r)
        blocks = _narrow(params, r)
        depth, embed = paths.flatten(blocks)["attention/q/kernel"].shape[0], _embed(params)
        width = embed // r
        bound = embed**-0.5
        train = {
            "blocks": blocks,
            "down": low_rank.uniform(methods.path_key(key, "down"), (depth, embed, width), bound),
            "gate": jnp.zeros((depth,)),
            "first": low_rank.uniform(methods.path_key(key, "first"), (embed, width), bound),
            "up": jnp.zeros((width, embed)),
        }
        return Start(train={ladder.SLOT: train})

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        return paths.replace(params, {ladder.SLOT: ladder.Ladder(**train[ladder.SLOT], temperature=temperature)})

    return methods.method("lst", init, bind, axes=_axes, targets=(ladder.SLOT,))


def _embed(params: Params) -> int:
    return next(iter(params["layers"].values()))["attention"]["q"]["kernel"].shape[-2]


def _check(params: Params, r: int) -> None:
    """Raises ConfigError where the factor does not divide a width; a head's, which no kernel says, the model judges."""
    mlp = next(iter(params["layers"].values()))["mlp"]["down"]["kernel"]
    for name, width in (("embed_dim", _embed(params)), ("mlp_dim", operators.innermost(mlp).shape[-2])):
        if width % r:
            raise errors.ConfigError(
                f"lst: reduction_factor is {r}, and {name} is {width}; expected one that divides it"
            )


def _narrow(params: Params, r: int) -> dict[str, Any]:
    """The stack's parameters, all segments in one, with every r-th entry of each axis but that of the layers."""
    parts = [paths.flatten(params["layers"][s.name]) for s in paths.segments(params)]
    out: dict[Path, Any] = {}
    for path in parts[0]:
        plain = [_plain(p[path]) for p in parts]
        if any(x is None for x in plain):
            out[path] = None
        else:
            whole = jnp.concatenate(plain).astype(jnp.float32)
            out[path] = whole[(slice(None), *(slice(None, None, r),) * (whole.ndim - 1))]
    return paths.unflatten(out)


def _plain(leaf: Any) -> Any:
    """The kernel that a leaf stands for, or where there is none, that which its operator was put around."""
    while operators.is_operator(leaf):
        try:
            leaf = operators.dense(leaf)
        except errors.NotLinear:
            leaf = operators.beneath(leaf)
    return leaf


def _axes(model_axes: Mapping[Path, Axes], train: Any) -> Any:
    """Blocks like the model's own."""
    rungs = train[ladder.SLOT]
    blocks = {p: x if x is None else model_axes[f"layers/0/{p}"] for p, x in paths.flatten(rungs["blocks"]).items()}
    out = {
        "blocks": paths.unflatten(blocks),
        "down": ("layers", "embed", None),
        "gate": ("layers",),
        "first": ("embed", None),
        "up": (None, "embed"),
    }
    return {ladder.SLOT: out}
