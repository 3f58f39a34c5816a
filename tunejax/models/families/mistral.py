"""Mistral 7B, with a sliding window in every layer: https://arxiv.org/abs/2310.06825."""

from tunejax.models.families import llama_like

FAMILY = llama_like.family(
    "mistral",
    "Mistral",
    defaults=llama_like.Defaults(max_positions=4096 * 32),
    # null means no window; a config.json without the key means what transformers takes.
    special=lambda read: {"sliding_window": read.get("sliding_window", read.contents.get("sliding_window", 4096))},
    write_special=lambda config: {"sliding_window": config.sliding_window},
)
