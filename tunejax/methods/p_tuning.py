"""P-tuning: a prompt's rows made by a small network (Liu et al., 2021, arXiv:2103.10385, section 3.2).

The virtual tokens are those of prompt tuning; their rows come from trained inputs E [length, embed] through an MLP or
a bidirectional LSTM with an MLP after it, as in PEFT's PromptEncoder (whose weights are stored transposed). The
network serves training alone: `flatten` runs it once and gives the rows. The law of identity at the start does not
hold, and nothing can be merged.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tunejax.core import errors, portable, prompts
from tunejax.core import method as methods
from tunejax.core.method import Context, Method

ALIASES = {
    "num_virtual_tokens": "length",
    "encoder_reparameterization_type": "encoder",
    "encoder_hidden_size": "hidden",
    "encoder_num_layers": "lstm_layers",
    "encoder_dropout": "dropout",
}
"""What PEFT calls it -> what it is here."""

ENCODERS = ("mlp", "lstm")
LAYERS = 2
"""Of an LSTM, unless told."""
GATES = 4
"""An LSTM's: input, forget, cell, output, in torch's order."""


def p_tuning(
    length: int = 20,
    encoder: str = "mlp",
    hidden: int | None = None,
    lstm_layers: int = LAYERS,
    dropout: float = 0.0,
) -> Method:
    """Trains the rows of virtual tokens through a network.

    Args:
      length: how many virtual tokens.
      encoder: "mlp" (three layers with ReLU) or "lstm" (bidirectional, then two layers with ReLU).
      hidden: inner width, of each direction in an LSTM; by default the model's.
      lstm_layers: of "lstm".
      dropout: between the layers of an LSTM, while training.

    Raises:
      ConfigError: length, hidden or lstm_layers below 1, an unknown encoder, dropout outside [0, 1), or arguments of
        "lstm" with another one.
      TargetError (from init): the model has no embedding table.
    """
    kind = encoder.lower()
    for name, value in (("length", length), ("hidden", 1 if hidden is None else hidden), ("lstm_layers", lstm_layers)):
        if value < 1:
            raise errors.ConfigError(f"p_tuning: {name} is {value}; it must be at least 1")
    if kind not in ENCODERS:
        raise errors.ConfigError(f"p_tuning: encoder is {encoder!r}. {errors.did_you_mean(kind, ENCODERS)}")
    if not 0.0 <= dropout < 1.0:
        raise errors.ConfigError(f"p_tuning: dropout is {dropout}; it must lie in [0, 1)")
    for name, told in (("lstm_layers", lstm_layers != LAYERS), ("dropout", dropout != 0.0)):
        if kind != "lstm" and told:
            raise errors.ConfigError(f"p_tuning: {name} is of encoder: lstm, and encoder is {encoder!r}; leave it out")

    def new(key: Any, table: Any) -> dict[str, Any]:
        embed = table.shape[-1]
        shapes = _shapes(kind, embed, embed if hidden is None else hidden, lstm_layers)
        drawn = {n: _uniform(methods.path_key(key, n), shape, fan) for n, (shape, fan) in shapes.items()}
        return {"rows": jax.random.normal(methods.path_key(key, "rows"), (length, embed), jnp.float32), **drawn}

    def wrap(table: Any, arrays: dict[str, Any], ctx: Context) -> prompts.Extended:
        return prompts.Extended(table, encode(arrays, dropout, ctx.key if ctx.train else None))

    return methods.per_site("p_tuning", prompts.TABLE, new, wrap, kernels=False, prompt=length)


def _shapes(kind: str, embed: int, hidden: int, layers: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name of each of the network's arrays -> (shape, fan-in that its range follows from)."""
    out: dict[str, tuple[tuple[int, ...], int]] = {}
    sizes = [embed, hidden, hidden, embed] if kind == "mlp" else [2 * hidden, 2 * hidden, embed]
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        out |= {f"w{i}": ((fan_in, fan_out), fan_in), f"bias{i}": ((fan_out,), fan_in)}
    for i in range(layers if kind == "lstm" else 0):
        # One entry of the first axis a direction: forwards, backwards.
        out[f"lstm{i}_x"] = ((2, embed if i == 0 else 2 * hidden, GATES * hidden), hidden)
        out[f"lstm{i}_h"] = ((2, hidden, GATES * hidden), hidden)
        out[f"lstm{i}_bias"] = ((2, GATES * hidden), hidden)
    return out


def _uniform(key: Any, shape: tuple[int, ...], fan: int) -> jax.Array:
    """As torch draws linear layers and LSTMs."""
    return jax.random.uniform(key, shape, jnp.float32, -1 / math.sqrt(fan), 1 / math.sqrt(fan))


def encode(arrays: Mapping[str, jax.Array], dropout: float = 0.0, key: Any = None) -> jax.Array:
    """The rows [length, embed] that the network makes of its inputs; dropout where a key comes."""
    x, i = arrays["rows"], 0
    while f"lstm{i}_x" in arrays:
        if i and key is not None and dropout:
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout), 0)
        x, i = lstm(x, *(arrays[f"lstm{i}_{n}"] for n in ("x", "h", "bias"))), i + 1
    last = max(int(n[1:]) for n in arrays if n.startswith("w"))
    for i in range(last + 1):
        x = x @ arrays[f"w{i}"] + arrays[f"bias{i}"]
        x = jax.nn.relu(x) if i < last else x
    return x


def lstm(x: jax.Array, w_x: jax.Array, w_h: jax.Array, b: jax.Array) -> jax.Array:
    """Both directions of one layer: x [length, in], w_x [2, in, 4h], w_h [2, h, 4h], b [2, 4h] -> [length, 2h].

    b is the sum of torch's two biases.
    """

    def one(x: jax.Array, w_x: jax.Array, w_h: jax.Array, b: jax.Array) -> jax.Array:
        def step(carry: tuple[jax.Array, jax.Array], at: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            h, c = carry
            enter, forget, cell, leave = jnp.split(at + h @ w_h, GATES)
            c = jax.nn.sigmoid(forget) * c + jax.nn.sigmoid(enter) * jnp.tanh(cell)
            h = jax.nn.sigmoid(leave) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros(w_h.shape[0], x.dtype)
        return jax.lax.scan(step, (zero, zero), x @ w_x + b)[1]

    forwards = one(x, w_x[0], w_h[0], b[0])
    backwards = one(x[::-1], w_x[1], w_h[1], b[1])[::-1]
    return jnp.concatenate([forwards, backwards], axis=-1)


def flatten(train: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, Any]:
    """The rows alone, once the network has made them: the ``train`` of prompt tuning, to save or serve."""
    return {path: {"rows": encode(arrays)} for path, arrays in train.items()}


PEFT = portable.Prompt("P_TUNING", False, lambda train: flatten(train)[prompts.TABLE.strip("/")]["rows"])
"""Its form in PEFT, which keeps the rows that the network made, and not the network."""
