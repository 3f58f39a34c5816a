"""Compacter: adapters whose kernels are sums of Kronecker products (Karimi Mahabadi et al., 2021, arXiv:2106.04647).

    W = sum_i A_i (x) (s_i t_i)        i = 1 .. phm_dim        (equation 5 there)

A_i [phm_dim, phm_dim] is shared by both kernels of every adapter; s_i [in / phm_dim, rank] and t_i [rank, out /
phm_dim] are each kernel's own. The t of the upper kernels start at zero, so that the adapter starts as the identity.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import activations, bottleneck, errors, operators
from tunejax.core import method as methods
from tunejax.core.bottleneck import Bottleneck
from tunejax.core.method import Axes, Context, Method, Start
from tunejax.core.paths import Params, Path

ALIASES = {**bottleneck.ALIASES, "phm_rank": "rank", "hypercomplex_division": "phm_dim"}
"""What AdapterHub and the paper's code call it -> what it is here."""

AXES: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("down_s", "down_t", "up_s", "up_t"), (None,) * 3),
    **{name: bottleneck.AXES[name] for name in ("down_bias", "up_bias")},
}


@operators.operator
class Kronecker:
    """The kernel sum_i a_i (x) (s_i t_i), never formed to be applied.

    a [..., n, n, n]; s [..., n, in / n, rank]; t [..., n, rank, out / n].
    """

    a: jax.Array
    s: jax.Array
    t: jax.Array

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]: sum over i, a, c of x[a, c] a_i[a, b] (s_i t_i)[c, d], at entry (b, d)."""
        a, s, t = (y.astype(x.dtype) for y in (self.a, self.s, self.t))
        parts = x.reshape(*x.shape[:-1], a.shape[-1], -1)
        narrow = jnp.einsum("...ac,icr->...air", parts, s)
        out = jnp.einsum("...air,iab,ird->...bd", narrow, a, t).reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias.astype(x.dtype)

    def dense(self) -> jax.Array:
        """The kernel [..., in, out]."""
        whole = jnp.einsum("...iab,...icr,...ird->...acbd", self.a, self.s, self.t, precision="highest")
        return whole.reshape(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        n = self.a.shape[-1]
        return (*self.a.shape[:-3], n * self.s.shape[-2], n * self.t.shape[-1])

    @property
    def dtype(self) -> Any:
        """Type of its arrays."""
        return self.s.dtype


def compacter(
    targets: str | list[str] = bottleneck.PLACES["houlsby"],
    width: int | None = None,
    reduction_factor: float = 32,
    phm_dim: int = 4,
    rank: int = 1,
    activation: str = "gelu",
    scale: float = 1.0,
    layers: str | int | None = None,
) -> Method:
    """Trains compact adapters of the outputs of targeted kernels; ``targets: mlp/down/kernel`` is Compacter++.

    Args:
      targets: globs over the kernels whose outputs are adapted.
      width: of the bottleneck, a multiple of ``phm_dim``.
      reduction_factor: the outer width over this, up to a multiple of ``phm_dim``, is the width where none is given.
      phm_dim: n, the number of terms and the size of each A_i.
      rank: of each s_i t_i.
      activation: in the bottleneck, by name (`core.activations`).
      scale: times what the adapter adds.
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: an unknown activation; a width, factor, rank or phm_dim out of range or that does not divide; from
        init: phm_dim does not divide a kernel's outputs.
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    activations.named(activation)
    bottleneck.width_of("compacter", 1, width, reduction_factor)
    if min(phm_dim, rank) < 1 or (width is not None and width % phm_dim):
        raise errors.ConfigError(
            f"compacter: phm_dim {phm_dim} and rank {rank} must be at least 1, and phm_dim divide the width {width}"
        )

    def new(key: Any, kernel: Any) -> dict[str, Any]:
        *lead, _, dim = kernel.shape
        if dim % phm_dim:
            raise errors.ConfigError(f"compacter: phm_dim {phm_dim} does not divide the {dim} outputs of a kernel")
        inner = bottleneck.width_of("compacter", dim, width, reduction_factor)
        inner = math.ceil(inner / phm_dim) * phm_dim
        keys = jax.random.split(key, 3)
        return {
            "down_s": _normal(keys[0], (*lead, phm_dim, dim // phm_dim, rank), dim),
            "down_t": _normal(keys[1], (*lead, phm_dim, rank, inner // phm_dim), rank),
            "down_bias": jnp.zeros((*lead, inner), jnp.float32),
            "up_s": _normal(keys[2], (*lead, phm_dim, inner // phm_dim, rank), inner),
            "up_t": jnp.zeros((*lead, phm_dim, rank, dim // phm_dim), jnp.float32),
            "up_bias": jnp.zeros((*lead, dim), jnp.float32),
        }

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Bottleneck:
        down, up = (Kronecker(arrays["a"], arrays[f"{w}_s"], arrays[f"{w}_t"]) for w in ("down", "up"))
        return Bottleneck(kernel, down, arrays["down_bias"], up, arrays["up_bias"], activation=activation, scale=scale)

    sites = methods.per_site("compacter", targets, new, wrap, layers=layers, axes=AXES)

    def init(key: Any, params: Params) -> Start:
        shared = _normal(methods.path_key(key, "shared"), (phm_dim,) * 3, phm_dim)
        return Start(train={"shared": shared, "sites": sites.init(key, params).train})

    def bind(params: Params, train: Any, state: Any, ctx: Context) -> Params:
        a = train["shared"]
        whole = {
            p: {**arrays, "a": jnp.broadcast_to(a, (*arrays["up_bias"].shape[:-1], *a.shape))}
            for p, arrays in train["sites"].items()
        }
        return sites.bind(params, whole, state, ctx)

    def axes(model_axes: Mapping[Path, Axes], train: Any) -> Any:
        return {"shared": (None,) * 3, "sites": sites.axes(model_axes, train["sites"])}

    return methods.method("compacter", init, bind, axes=axes, cuts=sites.cuts, targets=sites.targets)


def _normal(key: Any, shape: tuple[int, ...], fan: int) -> jax.Array:
    """Normal values of variance 1 / fan: with all three so, the lower kernel's entries have variance 1 / in."""
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan)
