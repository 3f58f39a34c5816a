"""Tiny random models made by PyTorch transformers, and their weights as our parameters."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from tunejax.core import paths
from tunejax.core.model import full_batch
from tunejax.models.build import build
from tunejax.models.config import ModelConfig
from tunejax.models.families import registry

torch.set_num_threads(1)

CLASSES = {
    "lm": transformers.AutoModelForCausalLM,
    "mlm": transformers.AutoModelForMaskedLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "none": transformers.AutoModel,
}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ROPE = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "pad_token_id": 0}


def torch_model(model_type: str, head: str, **changes: Any) -> Any:
    """A model with random weights, biases and norms included, so that none hides behind a zero or a one."""
    config = transformers.AutoConfig.for_model(model_type, **changes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = CLASSES[head].from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def to_params(model: Any, config: ModelConfig, head: str, cuts: tuple[int, ...] = ()) -> paths.Params:
    """The torch model's weights by the family's own table."""
    family = registry.get(config.family)
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}

    def theirs(tensor: Any, layer: int | None) -> np.ndarray | None:
        name = tensor.theirs.format(i=layer)
        bare = next((name.removeprefix(p) for p in family.prefixes if name.startswith(p)), name)
        array = state.get(name, state.get(bare))
        if array is None:
            assert tensor.optional, f"{name} not in {sorted(state)}"
            return None
        array = np.split(array, tensor.part[1], axis=-1)[tensor.part[0]]
        return array.T if tensor.transpose else array

    built = build(config, head=head, cuts=cuts)
    flat = dict.fromkeys(built.axes)
    edges = [0, *cuts, config.num_layers]
    for tensor in family.tensors(config, head):
        if not tensor.ours.startswith("layers/"):
            flat[tensor.ours] = theirs(tensor, None)
            continue
        for name, (start, stop) in enumerate(itertools.pairwise(edges)):
            stack = [theirs(tensor, i) for i in range(start, stop)]
            flat[tensor.ours.replace("layers", f"layers/{name}", 1)] = None if stack[0] is None else np.stack(stack)
    assert set(flat) == set(built.axes)
    return paths.unflatten({k: None if v is None else jnp.asarray(v) for k, v in flat.items()})


def ours(model: Any, head: str, cuts: tuple[int, ...] = (), **options: Any) -> tuple[Any, paths.Params, ModelConfig]:
    """(our model, its parameters, its config) of a torch model, by way of the config.json that it would write."""
    contents = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
    config = registry.get(model.config.model_type).read_config(contents)
    return build(config, head=head, cuts=cuts, **options), to_params(model, config, head, cuts), config


def ragged(side: str = "right", vocab: int = 97, length: int = 13) -> tuple[np.ndarray, np.ndarray]:
    """tokens, attention_mask [3, length] of rows of three lengths, padded with 0 on one side."""
    tokens = np.random.default_rng(1).integers(1, vocab, (3, length))
    sizes = np.array([length, 7, 4])[:, None]
    slots = np.arange(length)
    mask = (slots < sizes) if side == "right" else (slots >= length - sizes)
    return tokens * mask, mask.astype(np.int64)


def batch(tokens: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """Our batch of these rows."""
    return full_batch(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, jnp.int32))


def torch_logits(model: Any, tokens: np.ndarray, mask: np.ndarray, **more: Any) -> np.ndarray:
    """PyTorch's logits for these rows, with positions that count real tokens."""
    if model.config.model_type != "bert":
        more["position_ids"] = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), **more)
    return out.logits.numpy()
