"""Bottleneck adapters after a block's branches.

    Houlsby et al., 2019 (arXiv:1902.00751, section 2.1): after attention's output projection and after the MLP.
    Pfeiffer et al., 2021 (arXiv:2005.00247): after the MLP alone.

The adapter acts on the branch before it joins the residual. With ``reads: sum`` it reads what the block would give
without it, behind the block's norm where one follows, and still adds to the branch: that is AdapterHub's Pfeiffer
(``seq_bn``); with ``reads: residual`` it reads what the branch is added to (`core.joins`). Houlsby's also trains the
norms: ``method: [{name: houlsby}, {name: norm_tuning}]``.

AdapterDrop (Rücklé et al., 2021, arXiv:2010.11918): no adapters in the first layers, for good (``drop_first``), or in
the first n layers with n drawn anew at each step (``drop_random``), so that any few may be dropped afterwards.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import activations, bottleneck, errors, joins, paths, portable
from tunejax.core import method as methods
from tunejax.core.bottleneck import Bottleneck
from tunejax.core.method import Context, Method, Start
from tunejax.core.paths import Params

ALIASES = bottleneck.ALIASES
"""What AdapterHub calls it -> what it is here."""

_HUB = portable.Hub(
    name="seq_bn",
    write=bottleneck.to_hub,
    read=bottleneck.from_hub,
    flags={"phm_layer": False, "is_parallel": False},
    scaled=bottleneck.scaled,
)
ADAPTERHUB = {
    "houlsby": _HUB._replace(name="double_seq_bn", flags={**_HUB.flags, "mh_adapter": True, "output_adapter": True}),
    "pfeiffer": _HUB,
}


def houlsby(
    targets: str | list[str] = bottleneck.PLACES["houlsby"],
    width: int | None = None,
    reduction_factor: float = 16,
    activation: str = "relu",
    scale: float = 1.0,
    layers: str | int | None = None,
    drop_first: int = 0,
    drop_random: int = 0,
    reads: str = "branch",
) -> Method:
    """Trains two adapters a block, on the outputs of attention and of the MLP; with `norm_tuning` behind it, the norms
    too, as the paper does (Houlsby et al., arXiv:1902.00751).

    Args:
      targets: globs over the kernels whose outputs are adapted.
      width: of the bottleneck.
      reduction_factor: the outer width over this is the width where none is given.
      activation: in the bottleneck, by name (`core.activations`).
      scale: times what the adapter adds.
      layers: only these layers of the stack, as a slice: "-2:".
      drop_first: no adapters in this many of the first layers: the slice "n:".
      drop_random: while training, each step draws n from 0 to this and skips the adapters of the first n layers.
      reads: "branch", "sum" or "residual"; see this module.

    Raises:
      ConfigError: an unknown activation or ``reads``, a width or factor out of range, both ``layers`` and
        ``drop_first``; from init: ``drop_random`` leaves no layer.
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    made = _adapter("houlsby", targets, width, reduction_factor, activation, scale, layers, drop_first, drop_random)
    return joins.reading(made, reads)


def pfeiffer(
    targets: str | list[str] = bottleneck.PLACES["pfeiffer"],
    width: int | None = None,
    reduction_factor: float = 16,
    activation: str = "relu",
    scale: float = 1.0,
    layers: str | int | None = None,
    drop_first: int = 0,
    drop_random: int = 0,
    reads: str = "branch",
) -> Method:
    """Trains one adapter a block, on the output of the MLP (Pfeiffer et al., arXiv:2005.00247).

    Arguments and errors as of `houlsby`.
    """
    made = _adapter("pfeiffer", targets, width, reduction_factor, activation, scale, layers, drop_first, drop_random)
    return joins.reading(made, reads)


def _adapter(
    name: str,
    targets: str | list[str],
    width: int | None,
    reduction_factor: float,
    activation: str,
    scale: float,
    layers: str | int | None,
    drop_first: int,
    drop_random: int,
) -> Method:
    activations.named(activation)
    bottleneck.width_of(name, 1, width, reduction_factor)

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        inner = bottleneck.width_of(name, kernel.shape[-1], width, reduction_factor)
        return bottleneck.arrays(key, kernel, inner)

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Bottleneck:
        return Bottleneck(kernel, **arrays, activation=activation, scale=scale)

    layers = _after(name, layers, drop_first)
    method = methods.per_site(name, targets, new, wrap, layers=layers, axes=bottleneck.AXES)
    return _dropped(method, drop_random) if drop_random else method


def _after(name: str, layers: str | int | None, drop_first: int) -> str | int | None:
    if drop_first < 0 or (drop_first and layers is not None):
        raise errors.ConfigError(
            f"{name}: drop_first is {drop_first}" + ("; it must be at least 0" if drop_first < 0 else
            f" and layers is {layers!r}; they name the same thing, give one of them")
        )  # fmt: skip
    return f"{drop_first}:" if drop_first else layers


def _dropped(method: Method, most: int) -> Method:
    """``method`` whose training leaves out the adapters of the first 0 to ``most`` layers, drawn at each step."""

    def init(key: Any, params: Params) -> Start:
        depth = sum(s.size for s in paths.segments(params))
        if not 0 < most < depth:
            raise errors.ConfigError(f"{method.name}: drop_random is {most}; this model allows 0 to {depth - 1}")
        return method.init(key, params)

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        bound = method.bind(params, train, state, ctx)
        if not ctx.train or ctx.key is None:
            return bound
        first = jax.random.randint(methods.path_key(ctx.key, "drop_random"), (), 0, most + 1)
        on = {
            p: dataclasses.replace(paths.get(bound, p), on=jnp.arange(s.start, s.start + s.size) >= first)
            for s in paths.segments(params)
            for p in train
            if p in s
        }
        return paths.replace(bound, on)

    return method._replace(init=init, bind=bind)
