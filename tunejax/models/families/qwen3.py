"""Qwen3 (dense), with a norm on each head's queries and keys: https://arxiv.org/abs/2505.09388."""

from typing import Any

from tunejax.models.config import ModelConfig
from tunejax.models.families import common, llama_like, qwen2


def _special(read: common.Reader) -> dict[str, Any]:
    bias = bool(read.get("attention_bias", False))
    return {"attention_bias": (bias,) * 4, "qk_norm": True, "sliding_window": qwen2.window(read)}


def _write_special(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": common.all_or_none(config), **qwen2.write_window(config)}


FAMILY = llama_like.family(
    "qwen3",
    "Qwen3",
    defaults=qwen2.DEFAULTS._replace(head_dim=128),
    special=_special,
    write_special=_write_special,
    open_biases=("q", "k", "v", "o"),
)
