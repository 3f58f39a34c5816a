"""AdapterFusion: trained adapters, frozen, mixed by attention (Pfeiffer et al., 2021, arXiv:2005.00247, section 3.2).

    s = softmax_n(h Q · z_n K)        out = Σ_n s_n z_n V        z_n = h + adapter_n(h)

h is what the adapted kernel gives. Q, K and V train at each site; V is the identity at the start, so that is about the
adapters' mean, and a penalty keeps V near it (as in the authors' code). `adapter_stack` is the
other way to use several adapters.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import activations, bottleneck, errors, operators, paths, taken
from tunejax.core import method as methods
from tunejax.core.method import Axes, Context, Method, Start
from tunejax.core.paths import Params, Path
from tunejax.core.taken import Adapter

LOADED = {"adapters": lambda state: apart(state)}
"""Arguments that a config gives as folders of finished runs, whose adapters the recipe reads -> how a run's own state
gives them, when these folders may be gone."""

AGREE = {"activation": None, "scale": None, "reads": "branch"}
"""What the runs in those folders must have been trained with; None: what this method's argument of that name is."""

TRAINED = ("query", "key", "value")


@operators.operator
class Fused(operators.Above):
    """Σ_n s_n z_n value over n adapters; see this module.

    base: kernel [..., in, out], or an operator that stands for one. adapters: `core.bottleneck`'s arrays by name, each
    with an axis n before its own: down [..., n, out, width]. query, key, value [..., out, out].
    """

    base: Any
    adapters: Mapping[str, jax.Array]
    query: jax.Array
    key: jax.Array
    value: jax.Array
    activation: str = operators.static(default="relu")
    scale: float = operators.static(default=1.0)

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        h = operators.apply(self.base, x, bias)
        a = {k: v.astype(h.dtype) for k, v in self.adapters.items()}
        inner = jnp.einsum("...d,ndw->...nw", h, a["down"]) + a["down_bias"]
        inner = activations.named(self.activation)(inner)
        z = h[..., None, :] + self.scale * (jnp.einsum("...nw,nwd->...nd", inner, a["up"]) + a["up_bias"])
        # (h Q) · (z K) as ((h Q) Kᵀ) · z: one product a token instead of one a token and adapter.
        asked = operators.apply(self.key.T, operators.apply(self.query, h))
        scores = jnp.einsum("...d,...nd->...n", asked, z, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(h.dtype)
        return operators.apply(self.value, jnp.einsum("...n,...nd->...d", weights, z))

    def dense(self) -> jax.Array:
        """Raises NotLinear: activations and a softmax stand in it."""
        raise errors.NotLinear("adapters mixed by attention are no kernel; serve them unmerged")


def adapter_fusion(
    adapters: list[Any], activation: str = "relu", scale: float = 1.0, regularization: float = 0.01
) -> Method:
    """Trains, at each site of several trained adapters, the attention that mixes them (arXiv:2005.00247).

    Args:
      adapters: what each trained (`Adapter`), two at least; in a config, folders of finished runs of one adapter each.
        They must read their branches (``reads: branch``), as the mixture does. Folders are checked for that.
      activation, scale: those that all of them were trained with.
      regularization: weight of the penalty Σ (V - 1)², summed over entries and sites.

    Raises:
      ConfigError: fewer than two adapters, one that is no bottleneck adapter, or they stand at different kernels; an
        unknown activation; a negative weight.
      TargetError (from init): the model has no kernel at some site, or one of another width.
    """
    activations.named(activation)
    if regularization < 0:
        raise errors.ConfigError(f"adapter_fusion: regularization is {regularization}; it must be at least 0")
    stacked = fuse(adapters)

    def init(key: Any, params: Params) -> Start:
        sites = taken.at_segments("adapter_fusion", stacked, params)
        train = {p: _fresh(methods.path_key(key, p), paths.get(params, p)) for p in sites}
        return Start(train=train, state=jax.tree.map(jnp.asarray, sites))

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        fused = {
            p: Fused(paths.get(params, p), state[p], **arrays, activation=activation, scale=scale)
            for p, arrays in train.items()
        }
        return paths.replace(params, fused)

    def penalty(train: Any, state: Any, ctx: Context) -> jax.Array:
        far = [jnp.sum(jnp.square(t["value"] - jnp.eye(t["value"].shape[-1]))) for t in train.values()]
        return jnp.asarray(regularization * sum(far))

    return methods.method(
        "adapter_fusion",
        init,
        bind,
        penalty=penalty,
        axes=_axes,
        cuts=taken.cuts([stacked]),
        targets=taken.targets([stacked]),
    )


def fuse(adapters: Sequence[Adapter]) -> dict[Path, dict[str, Any]]:
    """The adapters as one: each array [layers, ...] of each site becomes [layers, n, ...].

    Narrower adapters are filled up with zeros, which add nothing whatever the activation: their ``up`` is zero there.

    Raises:
      ConfigError: fewer than two, one that is no bottleneck adapter, or they stand at different kernels.
    """
    taken.check("adapter_fusion", adapters, 2, "two adapters at least to mix")
    adapters = [taken.joined(a) for a in adapters]
    for i, adapter in enumerate(adapters):
        if set(adapter) != set(adapters[0]):
            raise errors.ConfigError(
                f"adapter_fusion: adapter {i} stands at {', '.join(adapter)} and adapter 0 at {', '.join(adapters[0])}"
            )
    return {p: {n: _stacked([a[p][n] for a in adapters], n) for n in bottleneck.AXES} for p in adapters[0]}


def apart(fused: Mapping[Path, Mapping[str, Any]]) -> list[Adapter]:
    """The adapters of which `fuse` made this; narrower ones keep the zeros that they were filled up with."""
    count = next((a["up_bias"].shape[-2] for a in fused.values()), 0)
    one = lambda x, name, i: np.take(np.asarray(x), i, axis=x.ndim - 1 - len(bottleneck.AXES[name]))  # noqa: E731
    return [{p: {n: one(x, n, i) for n, x in a.items()} for p, a in fused.items()} for i in range(count)]


def _stacked(arrays: Sequence[Any], name: str) -> np.ndarray:
    rank = arrays[0].ndim - len(bottleneck.AXES[name])
    grown = [max(a.shape[i] for a in arrays) for i in range(arrays[0].ndim)]
    full = [np.pad(np.asarray(a), [(0, g - n) for g, n in zip(grown, a.shape, strict=True)]) for a in arrays]
    return np.stack(full, axis=rank)


def _fresh(key: Any, kernel: Any) -> dict[str, jax.Array]:
    """Query and key as BERT draws its kernels; the value is the identity. kernel: [..., in, out]."""
    *lead, _, dim = kernel.shape
    shape = (*lead, dim, dim)
    drawn = 0.02 * jax.random.normal(key, (2, math.prod(shape)))
    eye = jnp.broadcast_to(jnp.eye(dim), shape) + jnp.zeros(shape)
    return {"query": drawn[0].reshape(shape), "key": drawn[1].reshape(shape), "value": eye}


def _axes(model_axes: Mapping[Path, Axes], train: Mapping[Path, Any]) -> dict[Path, dict[str, Axes]]:
    """Like the axis of the outputs, along the last one."""
    out = {}
    for path in train:
        *lead, _, last = model_axes[path]
        out[path] = dict.fromkeys(TRAINED, (*lead, None, last))
    return out
