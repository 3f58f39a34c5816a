"""Activations by name: what models and methods may put between two kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tunejax.core import errors

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}

HUGGING_FACE = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}
"""What transformers calls an activation -> what it is called here."""


def named(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of that name. Raises ConfigError for an unknown one."""
    if name not in ACTIVATIONS:
        raise errors.ConfigError(f"activation {name!r} is not known. {errors.did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
