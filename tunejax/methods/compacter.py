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
import numpy as np

from tunejax.core import activations, bottleneck, errors, joins, operators, portable
from tunejax.core import method as methods
from tunejax.core.bottleneck import Bottleneck
from tunejax.core.method import Context, Method

ALIASES = {**bottleneck.ALIASES, "phm_rank": "rank", "hypercomplex_division": "phm_dim"}
"""What AdapterHub and the paper's code call it -> what it is here."""

_HUB = {
    f"{ours}_{k}": f"{theirs}.{name}"
    for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up"))
    for k, name in (("s", "W_left"), ("t", "W_right"), ("bias", "b"))
}


def _to_hub(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {_HUB[k]: x for k, x in arrays.items()}


def _from_hub(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: tensors[theirs] for k, theirs in _HUB.items()}


ADAPTERHUB = portable.Hub(
    name="compacter",
    write=_to_hub,
    read=_from_hub,
    entries={"phm_dim": "phm_dim", "rank": "phm_rank"},
    flags={"phm_layer": True},
    fixed={
        "factorized_phm_W": True,
        "factorized_phm_rule": False,
        "phm_bias": True,
        "shared_phm_rule": True,
        "shared_W_phm": False,
    },
    write_shared=lambda arrays: {"phm_rule": arrays["a"]},
    read_shared=lambda tensors: {"a": tensors["phm_rule"]},
)

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
    reads: str = "branch",
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
      reads: "branch", "sum" or "residual" (`core.joins`).

    Raises:
      ConfigError: an unknown activation or ``reads``; a width, factor, rank or phm_dim out of range or that does not
        divide; from init: phm_dim does not divide a kernel's outputs.
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
        a = jnp.broadcast_to(arrays["a"], (*arrays["up_bias"].shape[:-1], *arrays["a"].shape))
        down, up = (Kronecker(a, arrays[f"{w}_s"], arrays[f"{w}_t"]) for w in ("down", "up"))
        return Bottleneck(kernel, down, arrays["down_bias"], up, arrays["up_bias"], activation=activation, scale=scale)

    def shared(key: Any, kernels: Any) -> dict[str, Any]:
        return {"a": _normal(key, (phm_dim,) * 3, phm_dim)}

    made = methods.per_site("compacter", targets, new, wrap, shared=shared, layers=layers, axes=AXES)
    return joins.reading(made, reads)


def _normal(key: Any, shape: tuple[int, ...], fan: int) -> jax.Array:
    """Normal values of variance 1 / fan: with all three so, the lower kernel's entries have variance 1 / in."""
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan)
