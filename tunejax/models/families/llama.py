"""Llama 2 and 3, TinyStories in Llama layout, SmolLM2: https://arxiv.org/abs/2307.09288, 2407.21783."""

from typing import Any

from tunejax.core import errors
from tunejax.models.config import ModelConfig
from tunejax.models.families import common, llama_like


def _special(read: common.Reader) -> dict[str, Any]:
    bias = bool(read.get("attention_bias", False))
    return {"attention_bias": (bias,) * 4, "mlp_bias": bool(read.get("mlp_bias", False))}


def _write_special(config: ModelConfig) -> dict[str, Any]:
    if config.embed_dim % config.num_heads:
        raise errors.CheckpointError(
            f"transformers refuses a llama whose embed_dim ({config.embed_dim}) is no multiple of its number of heads "
            f"({config.num_heads})"
        )
    return {"attention_bias": common.all_or_none(config), "mlp_bias": config.mlp_bias}


FAMILY = llama_like.family(
    "llama",
    "Llama",
    special=_special,
    write_special=_write_special,
    open_biases=("q", "k", "v", "o", "gate", "up", "down"),
)
