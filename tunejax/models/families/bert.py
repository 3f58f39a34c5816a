"""BERT and MiniLM: https://arxiv.org/abs/1810.04805, 2002.10957."""

from collections.abc import Mapping
from typing import Any

from tunejax.models.config import ModelConfig
from tunejax.models.families import common
from tunejax.models.family import Family, Tensor

ARCHITECTURES = {"mlm": "BertForMaskedLM", "classification": "BertForSequenceClassification", "none": "BertModel"}


def read_config(contents: Mapping[str, Any]) -> ModelConfig:
    """See `Family`."""
    read = common.Reader(contents, "bert")
    read.refuse("position_embedding_type", "absolute", "only absolute positions are supported")
    read.refuse("is_decoder", False, "BERT as a decoder is not supported")
    read.refuse("add_cross_attention", False, "cross attention is not supported")
    read.refuse("tie_word_embeddings", True, "an MLM head with a table of its own is not supported")
    embed, heads = read.need("hidden_size"), read.need("num_attention_heads")
    return ModelConfig(
        family="bert",
        kind="encoder",
        vocab_size=read.need("vocab_size"),
        embed_dim=embed,
        num_layers=read.need("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed // heads,
        mlp_dim=read.need("intermediate_size"),
        max_positions=read.get("max_position_embeddings", 512),
        activation=read.activation("hidden_act", "gelu"),
        gated_mlp=False,
        norm="layer",
        norm_eps=read.get("layer_norm_eps", 1e-12),
        position="learned",
        attention_bias=(True,) * 4,
        mlp_bias=True,
        tie_embeddings=True,
        type_vocab_size=read.get("type_vocab_size", 2),
        num_labels=read.num_labels(),
        dropout=read.get("hidden_dropout_prob", 0.1),
        extra=read.extra(),
    )


def write_config(config: ModelConfig, head: str) -> dict[str, Any]:
    """See `Family`."""
    c = config
    fields = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.mlp_dim,
        "max_position_embeddings": c.max_positions,
        "hidden_act": common.name_of(c.activation, "gelu"),
        "layer_norm_eps": c.norm_eps,
        "type_vocab_size": c.type_vocab_size,
        "hidden_dropout_prob": c.dropout,
    }
    labels = c.num_labels if head == "classification" else 0
    return common.written(c.extra, "bert", ARCHITECTURES[head], labels, fields)


def tensors(config: ModelConfig, head: str) -> list[Tensor]:
    """See `Family`. Heads are optional: a checkpoint without them gets fresh ones."""
    embeddings, layer = "bert.embeddings.", "bert.encoder.layer.{i}."
    out = [
        Tensor("embed/table", embeddings + "word_embeddings.weight"),
        Tensor("positions/table", embeddings + "position_embeddings.weight"),
        Tensor("types/table", embeddings + "token_type_embeddings.weight"),
        *_norm("embed_norm", embeddings + "LayerNorm"),
    ]
    attention = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    for ours, theirs in attention.items():
        out += _linear(f"layers/attention/{ours}", f"{layer}attention.{theirs}")
    out += _norm("layers/attention/norm", layer + "attention.output.LayerNorm")
    out += _linear("layers/mlp/up", layer + "intermediate.dense")
    out += _linear("layers/mlp/down", layer + "output.dense")
    out += _norm("layers/mlp/norm", layer + "output.LayerNorm")
    if head == "mlm":
        heads = _linear("mlm/dense", "cls.predictions.transform.dense")
        heads += _norm("mlm/norm", "cls.predictions.transform.LayerNorm")
        heads += [Tensor("mlm/bias", "cls.predictions.bias")]
    else:
        heads = _linear("pooler", "bert.pooler.dense")
    if head == "classification":
        heads += _linear("classifier", "classifier")
    return out + [t._replace(optional=True) for t in heads]


def _linear(ours: str, theirs: str) -> list[Tensor]:
    return [Tensor(f"{ours}/kernel", f"{theirs}.weight", transpose=True), Tensor(f"{ours}/bias", f"{theirs}.bias")]


def _norm(ours: str, theirs: str) -> list[Tensor]:
    return [Tensor(f"{ours}/scale", f"{theirs}.weight"), Tensor(f"{ours}/bias", f"{theirs}.bias")]


# Checkpoints of 2018, bert-base-uncased among them, name the norms' arrays after TensorFlow.
FAMILY = Family(
    "bert", read_config, write_config, tensors, ("bert.",), aliases=((".gamma", ".weight"), (".beta", ".bias"))
)
