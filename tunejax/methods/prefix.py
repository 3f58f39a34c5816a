"""Trained keys and values that every query of a layer sees: prefix tuning and P-tuning v2.

Li & Liang, 2021 (arXiv:2101.00190); Liu et al., 2021 (arXiv:2110.07602), whose deep prompts are the same without the
MLP. The pairs fill the slot ``attention/prefix`` of each layer (`core.prompts.Prefix`); they are not rotated, and real
tokens stand at positions ``length``, ``length + 1``, ..., as behind PEFT's past_key_values, or with ``positions:
false`` at 0, 1, ..., as behind AdapterHub's prefix. A softmax over more keys is another one, so the law of identity at
the start does not hold, and nothing can be merged.

With ``project`` a pair comes from a row e [width] by an MLP (equation 3 there): tanh(e W₁ + b₁) W₂ + b₂, whose last
product each layer has a part of. PEFT's embedding.weight is e; its transform.0 and .2 hold W₁ᵀ and W₂ᵀ, the outputs in
the order (layer, key or value, kv_heads · head_dim). Without it PEFT's embedding.weight [length, ...] holds the pairs
in this order.

AdapterHub's library keeps the MLP where it was not run and done with: wte.weight is e, control_trans.0 and .2 the
products. Its e is as wide as the model, and here as wide as the keys of a layer.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, paths, portable, prompts
from tunejax.core import method as methods
from tunejax.core.method import Axes, Context, Method, Start
from tunejax.core.paths import Params, Path

ALIASES = {
    "num_virtual_tokens": "length",
    "prefix_projection": "project",
    "encoder_hidden_size": "hidden",
    "init_weights": "init",
}
"""What PEFT calls it -> what it is here."""

SLOT = "attention/prefix"
PAIR = ("key", "value")


def prefix_tuning(
    length: int = 20,
    project: bool = False,
    hidden: int | None = None,
    init: str = "random",
    layers: str | int | None = None,
    positions: bool = True,
) -> Method:
    """Trains keys and values before those of the text, in every layer (arXiv:2101.00190).

    Args:
      length: how many.
      project: make them by an MLP from one row each (the paper's reparameterisation, which trains more steadily).
      hidden: inner width of the MLP; by default that of its rows, kv_heads · head_dim.
      init: "random" (standard normal, as in PEFT) or "zero" (of the last product, with ``project``).
      layers: only these layers of the stack, as a slice: "-2:". All layers count positions from ``length`` even so.
      positions: whether the text's positions count on from ``length``; else from 0, as AdapterHub has it.

    Raises:
      ConfigError: length or hidden below 1, an unknown init, hidden without project.
      TargetError (from init): the model has no attention, or other prefixes stand there.
    """
    _check(length, project, hidden, init)

    def init_(key: Any, params: Params) -> Start:
        return Start(train=_fresh(key, _slots(params, layers), length, project, hidden, init == "zero"))

    return methods.method(
        "prefix_tuning", init_, functools.partial(_bind, positions), axes=_axes,
        cuts=lambda depth: methods.layer_cuts(layers, depth), targets=(SLOT,), prefix=length if positions else 0,
    )  # fmt: skip


def p_tuning_v2(
    length: int = 20, init: str = "random", layers: str | int | None = None, positions: bool = True
) -> Method:
    """Trains keys and values in every layer without an MLP (arXiv:2110.07602); otherwise `prefix_tuning`."""
    return prefix_tuning(length, init=init, layers=layers, positions=positions)._replace(name="p_tuning_v2")


def _check(length: int, project: bool, hidden: int | None, init: str) -> None:
    if length < 1:
        raise errors.ConfigError(f"prefix_tuning: length is {length}; it must be at least 1")
    if hidden is not None and (hidden < 1 or not project):
        raise errors.ConfigError(
            f"prefix_tuning: hidden is {hidden}, the inner width of project: true; it must be at least 1"
        )
    if init not in ("random", "zero"):
        raise errors.ConfigError(f"prefix_tuning: init is {init!r}. {errors.did_you_mean(init, ('random', 'zero'))}")


def _slots(params: Params, layers: str | int | None) -> dict[Path, tuple[int, int]]:
    """Path of each empty slot -> (layers, kv), read off the key's kernel beside it. Raises TargetError."""
    found = paths.select(params, SLOT, layers=layers, empty=True).leaves
    out = {}
    for path in found:
        kernel = paths.get(params, path.removesuffix("prefix") + "k/kernel")
        out[path] = (kernel.shape[0], kernel.shape[-1])
    if not out:
        raise errors.TargetError(f"prefix_tuning: no slot {SLOT!r} is empty; does another method fill it?")
    return out


def _fresh(
    key: Any, slots: Mapping[Path, tuple[int, int]], length: int, project: bool, hidden: int | None, zero: bool
) -> dict[str, Any]:
    """What trains: by slot and, with ``project``, what the slots share."""
    if not project:
        return {p: {n: _normal(methods.path_key(key, f"{p}/{n}"), (size, length, kv), zero) for n in PAIR}
                for p, (size, kv) in slots.items()}  # fmt: skip
    width = next(iter(slots.values()))[1]
    inner = width if hidden is None else hidden
    train: dict[str, Any] = {
        "shared": {
            "rows": _normal(methods.path_key(key, "rows"), (length, width), False),
            "w": _linear(methods.path_key(key, "w"), (width, inner), width),
            "b": _linear(methods.path_key(key, "b"), (inner,), width),
        }
    }
    for path, (size, kv) in slots.items():
        shapes = {"key_w": (inner, kv), "key_b": (kv,), "value_w": (inner, kv), "value_b": (kv,)}
        train[path] = {
            n: jnp.zeros((size, *s)) if zero else _linear(methods.path_key(key, f"{path}/{n}"), (size, *s), inner)
            for n, s in shapes.items()
        }
    return train


def _normal(key: Any, shape: tuple[int, ...], zero: bool) -> jax.Array:
    return jnp.zeros(shape, jnp.float32) if zero else jax.random.normal(key, shape, jnp.float32)


def _linear(key: Any, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """As torch draws a linear layer's weight and bias."""
    return jax.random.uniform(key, shape, jnp.float32, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def _bind(positions: bool, params: Params, train: Mapping[str, Any], state: Any, ctx: Context) -> Params:
    return paths.replace(params, flatten(train, functools.partial(prompts.Prefix, positions=positions)))


def flatten(train: Mapping[str, Any], pair: Any = None) -> dict[Path, Any]:
    """Path of each slot -> its keys and values, each [layers, length, kv]: the MLP is run and done with.

    As a dict it is the ``train`` of the same method without ``project``, to save or serve.
    """
    out = {}
    shared = train.get("shared")
    inner = None if shared is None else jnp.tanh(shared["rows"] @ shared["w"] + shared["b"])
    for path, arrays in train.items():
        if path != "shared":
            made = arrays if inner is None else {n: _made(inner, arrays, n) for n in PAIR}
            out[path] = dict(made) if pair is None else pair(**made)
    return out


def _made(inner: jax.Array, arrays: Mapping[str, jax.Array], name: str) -> jax.Array:
    return jnp.einsum("ph,lhk->lpk", inner, arrays[f"{name}_w"]) + arrays[f"{name}_b"][:, None]


def _axes(model_axes: Mapping[Path, Axes], train: Mapping[str, Any]) -> dict[str, Any]:
    """Each array's last axis like the keys' and values', its first like the stack's."""

    def of(path: Path, x: Any) -> Axes:
        if path not in model_axes:
            return (None,) * len(x.shape)
        layer, *_, kv = model_axes[path]
        return (layer, *(None,) * (len(x.shape) - 2), kv)

    return {p: {n: of(p, x) for n, x in arrays.items()} for p, arrays in train.items()}


def _pairs(train: Mapping[str, Any]) -> jax.Array:
    """The pairs of all layers as PEFT keeps them: [length, layers · 2 · kv]."""
    made = flatten(train)
    stack = sorted(made, key=lambda p: int(p.split("/")[1]))
    key, value = (jnp.concatenate([made[p][n] for p in stack]) for n in PAIR)
    return jnp.stack([key, value], axis=1).transpose(2, 0, 1, 3).reshape(key.shape[1], -1)


PEFT = portable.Prompt("PREFIX_TUNING", True, _pairs, {"prefix_projection": False}, {"positions": True})
"""Its form in PEFT, which keeps the pairs that the network made, and not the network."""
_HUB = portable.HubPrefix("prefix_tuning", pairs=flatten, network=lambda train: train if "shared" in train else None)
ADAPTERHUB = {"prefix_tuning": _HUB, "p_tuning_v2": _HUB._replace(name="prefix_tuning_flat")}
