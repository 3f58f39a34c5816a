"""Qwen2 and Qwen2.5, with biases on queries, keys and values: https://arxiv.org/abs/2407.10671."""

from typing import Any

from tunejax.core import errors
from tunejax.models.config import ModelConfig
from tunejax.models.families import common, llama_like

DEFAULTS = llama_like.Defaults(max_positions=32768)


def window(read: common.Reader) -> int | None:
    """The sliding window where all layers use it, else None. Raises CheckpointError where some do."""
    if not read.get("use_sliding_window", False):
        return None
    depth = read.need("num_hidden_layers")
    first = read.get("max_window_layers", 28)
    kinds = read.get("layer_types", ["full_attention"] * min(first, depth) + ["sliding_attention"] * (depth - first))
    if len(set(kinds)) > 1:
        raise errors.CheckpointError(
            f"config.json: layer_types={sorted(set(kinds))} (or max_window_layers={first} of {depth}) mix full and "
            "sliding attention, which is not supported; expected one kind for all layers"
        )
    return read.get("sliding_window", 4096) if kinds[0] == "sliding_attention" else None


def write_window(config: ModelConfig) -> dict[str, Any]:
    """The keys that `window` reads."""
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": config.sliding_window, "max_window_layers": 0}


def _special(read: common.Reader) -> dict[str, Any]:
    return {"attention_bias": (True, True, True, False), "sliding_window": window(read)}


FAMILY = llama_like.family("qwen2", "Qwen2", defaults=DEFAULTS, special=_special, write_special=write_window)
