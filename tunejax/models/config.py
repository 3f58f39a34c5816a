"""The shape of a model: one frozen dataclass for every decoder and encoder."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a transformer. Hashable, so it can key a compilation.

    ``extra`` keeps what config.json said and nothing here reads (token ids, torch_dtype, ...), to write it back.
    """

    family: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    kind: str = "decoder"  # or "encoder"
    activation: str = "silu"  # silu, gelu (exact), gelu_tanh
    gated_mlp: bool = True
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    position: str = "rope"  # or "learned"
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None  # the items of config.json's rope_scaling, sorted
    sliding_window: int | None = None
    attention_bias: tuple[bool, bool, bool, bool] = (False, False, False, False)  # q, k, v, o
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    type_vocab_size: int = 0
    num_labels: int = 0
    dropout: float = 0.0
    extra: tuple[tuple[str, Any], ...] = ()
