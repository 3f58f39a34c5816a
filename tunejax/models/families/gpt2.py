"""GPT-2, with learned positions and a fused query-key-value kernel (Radford et al., 2019)."""

from collections.abc import Mapping
from typing import Any

from tunejax.models.config import ModelConfig
from tunejax.models.families import common
from tunejax.models.family import Family, Tensor

ARCHITECTURES = {"lm": "GPT2LMHeadModel", "classification": "GPT2ForSequenceClassification", "none": "GPT2Model"}


def read_config(contents: Mapping[str, Any]) -> ModelConfig:
    """See `Family`."""
    read = common.Reader(contents, "gpt2")
    read.refuse("scale_attn_weights", True, "unscaled attention is not supported")
    read.refuse("scale_attn_by_inverse_layer_idx", False, "scaling attention by the layer is not supported")
    read.refuse("add_cross_attention", False, "cross attention is not supported")
    embed, heads = read.need("n_embd"), read.need("n_head")
    return ModelConfig(
        family="gpt2",
        vocab_size=read.need("vocab_size"),
        embed_dim=embed,
        num_layers=read.need("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed // heads,
        mlp_dim=read.get("n_inner", 4 * embed),
        max_positions=read.need("n_positions"),
        activation=read.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        norm="layer",
        norm_eps=read.get("layer_norm_epsilon", 1e-5),
        position="learned",
        attention_bias=(True,) * 4,
        mlp_bias=True,
        tie_embeddings=read.get("tie_word_embeddings", True),
        num_labels=read.num_labels(),
        dropout=read.get("resid_pdrop", 0.1),
        extra=read.extra(),
    )


def write_config(config: ModelConfig, head: str) -> dict[str, Any]:
    """See `Family`."""
    c = config
    fields = {
        "vocab_size": c.vocab_size,
        "n_embd": c.embed_dim,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": c.mlp_dim,
        "n_positions": c.max_positions,
        "activation_function": common.name_of(c.activation, "gelu_new"),
        "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "resid_pdrop": c.dropout,
    }
    labels = c.num_labels if head == "classification" else 0
    return common.written(c.extra, "gpt2", ARCHITECTURES[head], labels, fields)


def tensors(config: ModelConfig, head: str) -> list[Tensor]:
    """See `Family`. GPT-2's Conv1D keeps kernels as [in, out], so none but the heads is transposed."""
    layer = "transformer.h.{i}."
    out = [Tensor("embed/table", "transformer.wte.weight"), Tensor("positions/table", "transformer.wpe.weight")]
    for ours, theirs in (("weight", "scale"), ("bias", "bias")):
        out.append(Tensor(f"layers/attention/norm/{theirs}", f"{layer}ln_1.{ours}"))
        out.append(Tensor(f"layers/mlp/norm/{theirs}", f"{layer}ln_2.{ours}"))
        out.append(Tensor(f"norm/{theirs}", f"transformer.ln_f.{ours}"))
    for theirs, ours in (("weight", "kernel"), ("bias", "bias")):
        for i, k in enumerate("qkv"):
            out.append(Tensor(f"layers/attention/{k}/{ours}", f"{layer}attn.c_attn.{theirs}", part=(i, 3)))
        out.append(Tensor(f"layers/attention/o/{ours}", f"{layer}attn.c_proj.{theirs}"))
        out.append(Tensor(f"layers/mlp/up/{ours}", f"{layer}mlp.c_fc.{theirs}"))
        out.append(Tensor(f"layers/mlp/down/{ours}", f"{layer}mlp.c_proj.{theirs}"))
    if head == "lm" and not config.tie_embeddings:
        out.append(Tensor("head/kernel", "lm_head.weight", transpose=True))
    if head == "classification":
        out.append(Tensor("head/kernel", "score.weight", transpose=True, optional=True))
    return out


FAMILY = Family("gpt2", read_config, write_config, tensors, ("transformer.",))
