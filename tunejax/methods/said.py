"""Tuning in a random subspace: the intrinsic dimension of a task (Aghajanyan et al., 2021, arXiv:2012.13255, equations
2 to 4).

    W + λ · P θ        θ [dim] = 0 at the start, shared by all sites; λ one number a site and layer, 1 at the start

P is a Fastfood transform (Le et al., 2013, arXiv:1408.3060), H G Π H B: B random signs, H the Walsh-Hadamard transform
over √N, Π a random permutation, G normal numbers, N the next power of two above the kernel's size. They are drawn anew
in each pass from a seed of two numbers a kernel, which is all that ``state`` holds: an adapter is as small as θ and λ.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, low_rank, operators
from tunejax.core import method as methods
from tunejax.core.method import Context, Method, Site
from tunejax.core.paths import Path

ALIASES = {k: v for k, v in low_rank.ALIASES.items() if v in ("targets", "layers")}
"""What PEFT calls it -> what it is here."""


@operators.operator
class Subspace(operators.Added):
    """base(x) + x (strength · P theta).

    base: kernel [..., in, out], or an operator. theta [..., dim]; strength [...]; seed [..., 2] of P.
    """

    base: Any
    theta: jax.Array
    strength: jax.Array
    seed: jax.Array

    def delta(self) -> jax.Array:
        """What is added to the kernel [..., in, out]."""
        fan_in, fan_out = self.shape[-2:]

        def one(theta: jax.Array, strength: jax.Array, seed: jax.Array) -> jax.Array:
            return strength * fastfood(theta, seed, fan_in * fan_out).reshape(fan_in, fan_out)

        for _ in self.shape[:-2]:
            one = jax.vmap(one)
        return one(self.theta, self.strength, self.seed)


def fastfood(theta: jax.Array, seed: jax.Array, size: int) -> jax.Array:
    """theta [dim] -> its image [size], each entry of variance ‖theta‖² / N over the draws of ``seed`` [2]."""
    n = power_of_two(max(size, theta.shape[-1]))
    signs, order, normal = draws(seed, n)
    padded = jnp.pad(theta, (0, n - theta.shape[-1]))
    return hadamard(normal * hadamard(signs * padded)[order])[:size]


def power_of_two(size: int) -> int:
    """The least power of two that is no smaller than ``size``."""
    return 1 << (size - 1).bit_length()


def draws(seed: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The random parts of one transform, each [n]: signs B, permutation Π, normal G."""
    keys = jax.random.split(jax.random.wrap_key_data(seed), 3)
    order = jax.random.permutation(keys[1], n)
    return jax.random.rademacher(keys[0], (n,), jnp.float32), order, jax.random.normal(keys[2], (n,))


def hadamard(v: jax.Array) -> jax.Array:
    """The Walsh-Hadamard transform of v [n], n a power of two, over √n: it preserves length."""
    n, width = v.shape[-1], 1
    while width < n:
        pairs = v.reshape(-1, 2, width)
        v = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        width *= 2
    return v.reshape(n) / n**0.5


def said(
    targets: str | list[str] = "/layers/**/kernel",
    dim: int = 1000,
    structure: bool = True,
    layers: str | int | None = None,
) -> Method:
    """Trains ``dim`` numbers, whose random image is added to every kernel.

    Args:
      targets: globs over kernels; every linear layer of the stack unless told.
      dim: size d of the subspace; the paper's count takes it less one a λ.
      structure: train λ (SAID); else it is 1 and frozen (DID).
      layers: only these layers of the stack, as a slice: "-2:".

    Raises:
      ConfigError: dim below 1.
      TargetError (from init): nothing matched, or what matched is no kernel.
    """
    if dim < 1:
        raise errors.ConfigError(f"said: dim is {dim}; it must be at least 1")

    def shared(key: Any, kernels: dict[Path, Any]) -> Site:
        return Site({"theta": jnp.zeros(dim)})

    def new(key: Any, kernel: Any) -> Site:
        lead = tuple(kernel.shape[:-2])
        seed = jax.random.bits(key, (*lead, 2), jnp.uint32)
        return Site({"strength": jnp.ones(lead)} if structure else {}, {"seed": seed})

    def wrap(kernel: Any, arrays: dict[str, Any], ctx: Context) -> Subspace:
        lead = tuple(kernel.shape[:-2])
        theta = jnp.broadcast_to(arrays["theta"], (*lead, dim))
        return Subspace(kernel, theta, arrays.get("strength", jnp.ones(lead)), arrays["seed"])

    return methods.per_site("said", targets, new, wrap, shared=shared, layers=layers)
