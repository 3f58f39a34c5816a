"""The encoder: BERT and its like, with post-norm blocks."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tunejax.core import errors, sites
from tunejax.core.paths import Params
from tunejax.models import modules, stack
from tunejax.models.blueprint import Noise
from tunejax.models.config import ModelConfig
from tunejax.models.view import View

HEADS = ("mlm", "classification", "none")


class EncoderBlock(stack.Block):
    """norm(x + attention(x)), then norm(x + mlp(x)); the gate goes from x to each of these."""

    def __call__(self, x: jax.Array, view: View, cache: Any, key: Any) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """See `stack.Block`."""
        keys = (None, None) if key is None else jax.random.split(key)
        attended, cache, inner = self.attention(x, view, cache)
        x = self._normed(self.attention, x, attended, keys[0])
        changed = self.mlp(x)
        x = self._normed(self.mlp, x, changed, keys[1])
        return x, cache, {**inner, "attention": attended, "mlp": changed}

    def _normed(self, part: modules.Attention | modules.Mlp, x: jax.Array, branch: jax.Array, key: Any) -> jax.Array:
        branch = sites.join(part.join.get_value(), modules.dropout(branch, self.rate, key), x, part.norm)
        return sites.blend(self.gate.get_value(), part.norm(x + branch), x)


class MlmHead(nnx.Module):
    """norm(act(x dense)), against the table, plus a bias over the vocabulary."""

    def __init__(self, config: ModelConfig, *, dtype: Any, noise: Noise) -> None:
        c = config
        self.act = c.activation
        self.dense = modules.Linear(c.embed_dim, c.embed_dim, True, std=modules.init_scale(c), dtype=dtype, noise=noise)
        self.norm = modules.Norm(c.embed_dim, "layer", c.norm_eps, dtype=dtype)
        self.bias = nnx.Param(jnp.zeros((c.vocab_size,), dtype))


class Encoder(nnx.Module):
    """All of an encoder but its stack: embeddings and heads."""

    def __init__(self, config: ModelConfig, head: str, *, dtype: Any, noise: Noise) -> None:
        c = config
        self.rate = c.dropout
        self.embed = modules.Table(c.vocab_size, c, dtype=dtype, noise=noise)
        self.positions = modules.Table(c.max_positions, c, dtype=dtype, noise=noise)
        self.types = modules.Table(c.type_vocab_size, c, dtype=dtype, noise=noise)
        self.embed_norm = modules.Norm(c.embed_dim, "layer", c.norm_eps, dtype=dtype)
        made = {"std": modules.init_scale(c), "dtype": dtype, "noise": noise}
        if head == "mlm":
            self.mlm = MlmHead(c, dtype=dtype, noise=noise)
        else:
            self.pooler = modules.Linear(c.embed_dim, c.embed_dim, True, **made)
        if head == "classification":
            self.classifier = modules.Linear(c.embed_dim, c.num_labels, True, **made)

    def enter(self, batch: Mapping[str, jax.Array], where: sites.Where, dtype: Any, key: Any) -> jax.Array:
        """tokens (and token_types) [batch, length] -> [batch, length, embed], the input of the stack."""
        tokens = batch["tokens"]
        types = batch.get("token_types")
        types = jnp.zeros_like(tokens) if types is None else types
        x = self.embed(tokens, dtype) + self.types(types, dtype) + self.positions(where.positions, dtype)
        return modules.dropout(self.embed_norm(x), self.rate, key)

    def leave(self, x: jax.Array) -> jax.Array:
        """The output of the stack -> hidden: a post-norm stack ends normed."""
        return x


def head_keys(config: ModelConfig, head: str) -> tuple[str, ...]:
    """The entries of the parameters that `logits` reads."""
    return {"mlm": ("embed", "mlm"), "classification": ("pooler", "classifier")}.get(head, ())


def logits(config: ModelConfig, head: str, params: Params, hidden: jax.Array) -> jax.Array:
    """hidden [..., embed] -> [..., vocab], or [..., labels] of a classification head.

    Raises:
      ConfigError: the model was built without a head.
    """
    if head == "mlm":
        p = params["mlm"]
        x = modules.activation(config.activation)(sites.linear(p["dense"]["kernel"], hidden, p["dense"]["bias"]))
        x = modules.layer_norm(x, p["norm"]["scale"], p["norm"]["bias"], config.norm_eps)
        return sites.attend(params["embed"]["table"], x) + p["bias"].astype(x.dtype)
    if head == "classification":
        pooler, classifier = params["pooler"], params["classifier"]
        pooled = jnp.tanh(sites.linear(pooler["kernel"], hidden, pooler["bias"]))
        return sites.linear(classifier["kernel"], pooled, classifier["bias"])
    raise errors.ConfigError('this model was built with head="none" and has no logits')
