"""What bottleneck adapters share: a narrow network with one activation, added to what a kernel gives.

h + scale · (act(h W_down + b_down) W_up + b_up)        h = x W + b;  W_up = b_up = 0 at the start
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunejax.core import activations, errors, operators

PLACES = {"houlsby": ["attention/o/kernel", "mlp/down/kernel"], "pfeiffer": ["mlp/down/kernel"]}
"""Kernels whose output each arrangement adapts: two a block, or one."""

AXES: dict[str, tuple[str | None, ...]] = {
    "down": ("out", None),
    "down_bias": (None,),
    "up": (None, "out"),
    "up_bias": ("out",),
}
"""How an adapter's arrays lie along the kernel that it follows."""

ALIASES = {
    "bottleneck_size": "width",
    "non_linearity": "activation",
    "scaling": "scale",
    "target_modules": "targets",
    "layers_to_transform": "layers",
}
"""What AdapterHub and PEFT call it -> what it is here."""


HUB = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
"""What AdapterHub's library calls an adapter's arrays; it keeps kernels as [out, in]."""


def to_hub(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One layer's arrays as AdapterHub's library keeps them."""
    return {HUB[k]: x.T for k, x in arrays.items()}


def from_hub(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_hub`. Raises KeyError where a tensor is missing."""
    return {k: tensors[theirs].T for k, theirs in HUB.items()}


def scaled(arrays: Mapping[str, np.ndarray], factors: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays of the adapter that adds ``factors`` ([1] or [out]) times as much."""
    return {**arrays, "up": arrays["up"] * factors, "up_bias": arrays["up_bias"] * factors}


@operators.operator
class Bottleneck(operators.Above):
    """h + scale · narrow(h) for h = base(x, bias).

    base: kernel [..., in, out], or an operator that stands for one.
    down [..., out, width], up [..., width, out], or operators for them; down_bias [..., width]; up_bias [..., out].
    on: [...] 1 or 0 a layer: whether the adapter acts there; None: everywhere.
    """

    base: Any
    down: Any
    down_bias: jax.Array
    up: Any
    up_bias: jax.Array
    on: jax.Array | None = None
    activation: str = operators.static(default="relu")
    scale: float = operators.static(default=1.0)

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out]."""
        h, change = self.parts(x, bias)
        return h + change

    def parts(self, x: jax.Array, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """h, and what is added to it; each [..., out]."""
        h = operators.apply(self.base, x, bias)
        return h, self.change(h)

    def change(self, h: jax.Array) -> jax.Array:
        """What is added where h [..., out] is read: the same shape."""
        inner = activations.named(self.activation)(operators.apply(self.down, h, self.down_bias))
        change = self.scale * operators.apply(self.up, inner, self.up_bias)
        return change if self.on is None else change * self.on.astype(change.dtype)

    def dense(self) -> jax.Array:
        """Raises NotLinear: an activation stands in it."""
        raise errors.NotLinear(f"a bottleneck adapter with {self.activation} is no kernel; serve it unmerged")


def width_of(name: str, dim: int, width: int | None, reduction_factor: float) -> int:
    """The inner width: as told, or the outer one ``dim`` over the reduction factor, at least 1.

    Raises:
      ConfigError: a width below 1, a factor that is no positive number.
    """
    if width is not None and width < 1:
        raise errors.ConfigError(f"{name}: width is {width}; it must be at least 1")
    if not 0 < reduction_factor < math.inf:
        raise errors.ConfigError(f"{name}: reduction_factor is {reduction_factor}; it must be a positive number")
    return width if width is not None else max(1, int(dim / reduction_factor))


def arrays(key: Any, kernel: Any, width: int) -> dict[str, jax.Array]:
    """Fresh arrays of an adapter of the outputs of ``kernel`` [..., in, out]: the identity, since ``up`` is zero."""
    *lead, _, dim = kernel.shape
    bound = 1.0 / math.sqrt(dim)
    return {
        "down": jax.random.uniform(key, (*lead, dim, width), jnp.float32, -bound, bound),
        "down_bias": jnp.zeros((*lead, width), jnp.float32),
        "up": jnp.zeros((*lead, width, dim), jnp.float32),
        "up_bias": jnp.zeros((*lead, dim), jnp.float32),
    }
