"""The decoder: Llama, Mistral, Qwen, GPT-2 and their like, by config."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from tunejax.core import errors, sites
from tunejax.core.paths import Params
from tunejax.models import modules, stack
from tunejax.models.blueprint import Noise
from tunejax.models.config import ModelConfig
from tunejax.models.view import View

HEADS = ("lm", "classification", "none")


class DecoderBlock(stack.Block):
    """x + gate attention(norm x), then x + gate mlp(norm x)."""

    def __call__(self, x: jax.Array, view: View, cache: Any, key: Any) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """See `stack.Block`."""
        keys = (None, None) if key is None else jax.random.split(key)
        attended, cache, inner = self.attention(self.attention.norm(x), view, cache)
        x = self._added(self.attention, x, attended, keys[0])
        changed = self.mlp(self.mlp.norm(x))
        x = self._added(self.mlp, x, changed, keys[1])
        return x, cache, {**inner, "attention": attended, "mlp": changed}

    def _added(self, part: modules.Attention | modules.Mlp, x: jax.Array, branch: jax.Array, key: Any) -> jax.Array:
        branch = sites.join(part.join.get_value(), modules.dropout(branch, self.rate, key), x)
        return x + sites.gate(self.gate.get_value(), branch)


class Decoder(nnx.Module):
    """All of a decoder but its stack: embeddings, final norm, head."""

    def __init__(self, config: ModelConfig, head: str, *, dtype: Any, noise: Noise) -> None:
        c = config
        self.rate = c.dropout
        self.embed = modules.Table(c.vocab_size, c, dtype=dtype, noise=noise)
        if c.position == "learned":
            self.positions = modules.Table(c.max_positions, c, dtype=dtype, noise=noise)
        self.norm = modules.Norm(c.embed_dim, c.norm, c.norm_eps, dtype=dtype)
        made = {"std": modules.init_scale(c), "dtype": dtype, "noise": noise}
        if head == "lm" and not c.tie_embeddings:
            self.head = modules.Linear(c.embed_dim, c.vocab_size, False, **made)
        if head == "classification":
            self.head = modules.Linear(c.embed_dim, c.num_labels, False, **made)

    def enter(self, batch: Mapping[str, jax.Array], where: sites.Where, dtype: Any, key: Any) -> jax.Array:
        """tokens [batch, length] -> [batch, length, embed], the input of the stack."""
        x = self.embed(batch["tokens"], dtype)
        if hasattr(self, "positions"):
            x = x + self.positions(where.positions, dtype)
        return modules.dropout(x, self.rate, key)

    def leave(self, x: jax.Array) -> jax.Array:
        """The output of the stack -> hidden."""
        return self.norm(x)


def head_keys(config: ModelConfig, head: str) -> tuple[str, ...]:
    """The entries of the parameters that `logits` reads."""
    return {"lm": ("embed",) if config.tie_embeddings else ("head",), "classification": ("head",)}.get(head, ())


def logits(config: ModelConfig, head: str, params: Params, hidden: jax.Array) -> jax.Array:
    """hidden [..., embed] -> [..., vocab], or [..., labels] of a classification head.

    Raises:
      ConfigError: the model was built without a head.
    """
    if head == "none":
        raise errors.ConfigError('this model was built with head="none" and has no logits')
    if head == "lm" and config.tie_embeddings:
        return sites.attend(params["embed"]["table"], hidden)
    return sites.linear(params["head"]["kernel"], hidden, params["head"].get("bias"))
