"""What Llama, Mistral and Qwen have in common: one layout of tensors, one set of keys in config.json."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tunejax.models.config import ModelConfig
from tunejax.models.families import common
from tunejax.models.family import Family, Tensor

ARCHITECTURES = {"lm": "ForCausalLM", "classification": "ForSequenceClassification", "none": "Model"}


class Defaults(NamedTuple):
    """What transformers takes where config.json says nothing."""

    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 2048
    head_dim: int | None = None


def family(
    model_type: str,
    prefix: str,
    *,
    defaults: Defaults = Defaults(),
    special: Callable[[common.Reader], dict[str, Any]] = lambda read: {},
    write_special: Callable[[ModelConfig], dict[str, Any]] = lambda config: {},
    open_biases: tuple[str, ...] = (),
) -> Family:
    """A family of this layout.

    Args:
      model_type: in config.json.
      prefix: of its classes in transformers: "Llama" for LlamaForCausalLM.
      defaults: of keys that config.json lacks.
      special: what the family reads besides: fields of `ModelConfig`.
      write_special: the keys of config.json that ``special`` read.
      open_biases: kernels whose biases transformers can load though this config has none ("q", "up", ...).
    """

    def read_config(contents: Mapping[str, Any]) -> ModelConfig:
        read = common.Reader(contents, model_type)
        heads, embed = read.need("num_attention_heads"), read.need("hidden_size")
        fields = dict(
            family=model_type,
            vocab_size=read.need("vocab_size"),
            embed_dim=embed,
            num_layers=read.need("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=read.get("num_key_value_heads", heads),
            head_dim=read.get("head_dim", defaults.head_dim or embed // heads),
            mlp_dim=read.need("intermediate_size"),
            max_positions=read.get("max_position_embeddings", defaults.max_positions),
            activation=read.activation("hidden_act", "silu"),
            norm_eps=read.get("rms_norm_eps", defaults.norm_eps),
            tie_embeddings=read.get("tie_word_embeddings", False),
            num_labels=read.num_labels(),
            **read.rope(defaults.rope_theta),
        )
        return ModelConfig(**{**fields, **special(read)}, extra=read.extra())

    def write_config(config: ModelConfig, head: str) -> dict[str, Any]:
        c = config
        fields = dict(
            vocab_size=c.vocab_size,
            hidden_size=c.embed_dim,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.mlp_dim,
            max_position_embeddings=c.max_positions,
            hidden_act=common.name_of(c.activation, "silu"),
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tie_embeddings,
            rope_theta=c.rope_theta,
            rope_scaling=None if c.rope_scaling is None else dict(c.rope_scaling),
            **write_special(c),
        )
        labels = c.num_labels if head == "classification" else 0
        return common.written(c.extra, model_type, prefix + ARCHITECTURES[head], labels, fields)

    def tensors(config: ModelConfig, head: str) -> list[Tensor]:
        return _tensors(config, head, open_biases)

    return Family(model_type, read_config, write_config, tensors, ("model.",))


def _tensors(config: ModelConfig, head: str, open_biases: tuple[str, ...]) -> list[Tensor]:
    layer = "model.layers.{i}."
    attention = {k: f"self_attn.{k}_proj" for k in "qkvo"}
    has_bias = dict(zip("qkvo", config.attention_bias, strict=True))
    mlp = {k: f"mlp.{k}_proj" for k in ("gate", "up", "down")}
    has_bias.update(dict.fromkeys(mlp, config.mlp_bias))
    out = [Tensor("embed/table", "model.embed_tokens.weight")]
    out.append(Tensor("layers/attention/norm/scale", layer + "input_layernorm.weight"))
    for part, names in (("attention", attention), ("mlp", mlp)):
        for ours, theirs in names.items():
            out.append(Tensor(f"layers/{part}/{ours}/kernel", f"{layer}{theirs}.weight", transpose=True))
            if has_bias[ours] or ours in open_biases:
                path = f"layers/{part}/{ours}/bias"
                out.append(Tensor(path, f"{layer}{theirs}.bias", optional=not has_bias[ours]))
    if config.qk_norm:
        for k in "qk":
            out.append(Tensor(f"layers/attention/{k}_norm/scale", f"{layer}self_attn.{k}_norm.weight"))
    out.append(Tensor("layers/mlp/norm/scale", layer + "post_attention_layernorm.weight"))
    out.append(Tensor("norm/scale", "model.norm.weight"))
    if head == "lm" and not config.tie_embeddings:
        out.append(Tensor("head/kernel", "lm_head.weight", transpose=True))
    if head == "classification":
        out.append(Tensor("head/kernel", "score.weight", transpose=True, optional=True))
    return out
