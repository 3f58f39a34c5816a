"""What stands at an embedding table or in an attention's prefix slot where virtual tokens are trained.

A soft prompt is extra vocabulary: its virtual tokens have ids from the table's last row on. Whoever makes batches
puts these ids before each example or into it (`core.method.Method.prompt` says how many), so positions, masks, packing
and cached decoding need to know nothing of it.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, operators, sites

TABLE = "/embed/table"
"""Where every family keeps its vocabulary."""


@operators.operator
class Extended:
    """A table with rows after its last. table: [vocab, embed] or an operator that stands for one; rows [n, embed].

    Invariant: `lookup` of id vocab + i is rows[i], `attend` answers with the vocab real rows alone. Nested, the outer
    rows come after the inner ones.
    """

    table: Any
    rows: jax.Array

    def lookup(self, ids: jax.Array) -> jax.Array:
        """ids [...] -> [..., embed]. Ids beyond the last row give zeros."""
        first, count = self.table.shape[0], self.rows.shape[0]
        virtual = ids >= first
        # Real tokens look up no row at all, so the gradient of the rows is made from virtual tokens alone.
        places = jnp.where(virtual, ids - first, count)
        rows = jnp.take(self.rows, places, axis=0, mode="fill", fill_value=0)
        return jnp.where(virtual[..., None], rows, sites.lookup(self.table, ids))

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., embed] -> [..., vocab]: a virtual token is never predicted."""
        return sites.attend(self.table, x)

    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Raises NotLinear: a table is looked up."""
        raise errors.NotLinear("a table with virtual tokens is looked up, not multiplied by")

    def dense(self) -> jax.Array:
        """Raises NotLinear: a model without virtual tokens has no place for their rows."""
        raise errors.NotLinear(
            f"{self.rows.shape[0]} virtual tokens are no part of the vocabulary; keep them as an adapter"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[vocab + n, embed]."""
        return (self.table.shape[0] + self.rows.shape[0], *self.table.shape[1:])

    @property
    def dtype(self) -> Any:
        """Type of the table."""
        return self.table.dtype


def row_gate(x: jax.Array, gate: jax.Array, gate_bias: jax.Array) -> jax.Array:
    """The mean of sigmoid(x gate + gate_bias) over the tokens of a row: x [..., length, in] -> [..., 1], float32."""
    return jnp.mean(jax.nn.sigmoid(x.astype(jnp.float32) @ gate + gate_bias), axis=-1, keepdims=True)


@operators.operator
class Prefix:
    """Keys and values that every query of a layer sees; each [..., n, kv], where kv = kv_heads · head_dim.

    Stands in the slot ``attention/prefix`` and unpacks as (key, value).
    gate [..., embed], gate_bias [...]: with ``per: token`` each query sees the prefix as `strength` says, with ``row``
    all of a row see what `pair` gives; None: it is seen as any other key.
    positions: whether it takes positions (`taken`), so that the model counts those of the text from n on.
    """

    key: jax.Array
    value: jax.Array
    gate: jax.Array | None = None
    gate_bias: jax.Array | None = None
    per: str = operators.static(default="token")
    positions: bool = operators.static(default=True)

    @property
    def taken(self) -> int:
        """How many positions stand before the text's."""
        return self.key.shape[-2] if self.positions else 0

    def strength(self, x: jax.Array) -> jax.Array | None:
        """Attention's input x [batch, length, embed] -> log sigmoid(x gate + gate_bias) [batch, length], float32."""
        if self.gate is None or self.gate_bias is None or self.per != "token":
            return None
        return jax.nn.log_sigmoid(x.astype(jnp.float32) @ self.gate + self.gate_bias)

    def pair(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values, each [n, kv]; behind a gate of rows, times its mean over x [batch, length, embed]: [batch,
        n, kv]."""
        if self.gate is None or self.gate_bias is None or self.per != "row":
            return self.key, self.value
        weight = row_gate(x, self.gate, self.gate_bias)[..., None]
        return weight * self.key, weight * self.value

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.key, self.value))

    def dense(self) -> jax.Array:
        """Raises NotLinear: no kernel adds a key."""
        raise errors.NotLinear(f"{self.key.shape[-2]} trained keys and values have no kernel; keep them as an adapter")

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., n, kv]."""
        return self.key.shape

    @property
    def dtype(self) -> Any:
        """Type of the keys."""
        return self.key.dtype
