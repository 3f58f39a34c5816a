"""What stands in the slot ``ladder``: a narrow stack beside the model's, which reads what each block gives.

    s_0 = x_0 first        s_i = block_i(μ_i h_i down_i + (1 - μ_i) s_{i-1})        hidden = h_L + s_L up

x_0 enters the stack, h_i is what its block i gives, and μ_i = sigmoid(gate_i / temperature). The blocks are of the
model's own kind, every width of them 1 / r of what it is there; `models` runs them.
"""

from typing import Any

import jax

from tunejax.core import errors, operators

SLOT = "ladder"
"""Path of the slot, which every model has."""


@operators.operator
class Ladder:
    """See this module. blocks: the parameters of a block, stacked [layers, ...], as a nested dict; no slot is filled.

    down [layers, embed, embed / r]; gate [layers]; first [embed, embed / r]; up [embed / r, embed].
    """

    blocks: dict[str, Any]
    down: jax.Array
    gate: jax.Array
    first: jax.Array
    up: jax.Array
    temperature: float = operators.static(default=0.1)

    def rung(self) -> tuple[jax.Array, jax.Array]:
        """(down, μ) of every layer, stacked."""
        return self.down, jax.nn.sigmoid(self.gate / self.temperature)

    def dense(self) -> jax.Array:
        """Raises NotLinear: it is no kernel."""
        raise errors.NotLinear("a ladder is a network of its own; keep it as an adapter")

    @property
    def shape(self) -> tuple[int, ...]:
        """[layers, embed, embed / r]."""
        return self.down.shape

    @property
    def dtype(self) -> Any:
        """Type of what trains."""
        return self.down.dtype
