"""Every family against PyTorch transformers, with random weights, on ragged batches."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.models import helpers
from tunejax.core import errors
from tunejax.models.families import registry

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
CASES = {
    "llama": ("llama", "lm", helpers.ROPE),
    "llama3": ("llama", "lm", {**helpers.ROPE, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("llama", "lm", {**helpers.ROPE, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama-linear": ("llama", "lm", {**helpers.ROPE, "rope_parameters": LINEAR}),
    "mistral": ("mistral", "lm", {**helpers.ROPE, "sliding_window": 4}),
    "qwen2": ("qwen2", "lm", helpers.ROPE),
    "qwen2-window": ("qwen2", "lm", {**helpers.ROPE, "use_sliding_window": True, "sliding_window": 5,
                                     "max_window_layers": 0}),
    "qwen3": ("qwen3", "lm", {**helpers.ROPE, "head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", "lm", helpers.GPT2),
    "bert": ("bert", "mlm", helpers.SMALL),
}  # fmt: skip
CLASSIFIERS = {
    "llama": ("llama", {**helpers.ROPE, "num_labels": 3}),
    "gpt2": ("gpt2", {**helpers.GPT2, "num_labels": 3}),
    "bert": ("bert", {**helpers.SMALL, "num_labels": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pytorch(case):
    model_type, head, changes = CASES[case]
    theirs = helpers.torch_model(model_type, head, **changes)
    model, params, _ = helpers.ours(theirs, head)
    run = jax.jit(lambda p, b: model.logits(p, model.hidden(p, b)[0]))
    for side in ("right", "left"):
        if case == "bert" and side == "left":
            continue  # transformers counts BERT's positions from the padding
        tokens, mask = helpers.ragged(side)
        expected = helpers.torch_logits(theirs, tokens, mask)
        got = np.asarray(run(params, helpers.batch(tokens, mask)))
        np.testing.assert_allclose(got[mask > 0], expected[mask > 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classification_equals_pytorch(case):
    model_type, changes = CLASSIFIERS[case]
    theirs = helpers.torch_model(model_type, "classification", **changes)
    model, params, config = helpers.ours(theirs, "classification")
    assert config.num_labels == 3
    tokens, mask = helpers.ragged()
    expected = helpers.torch_logits(theirs, tokens, mask)
    at = np.zeros(3, int) if case == "bert" else mask.sum(1) - 1
    hidden = model.hidden(params, helpers.batch(tokens, mask))[0][np.arange(3), at]
    np.testing.assert_allclose(model.logits(model.head(params), hidden), expected, atol=1e-4, rtol=0)


def test_token_types_equal_pytorch():
    theirs = helpers.torch_model("bert", "mlm", **helpers.SMALL)
    model, params, _ = helpers.ours(theirs, "mlm")
    tokens, mask = helpers.ragged()
    types = (np.arange(tokens.shape[1]) > 3).astype(np.int64) * mask
    import torch

    expected = helpers.torch_logits(theirs, tokens, mask, token_type_ids=torch.tensor(types))
    batch = helpers.batch(tokens, mask) | {"token_types": jnp.asarray(types, jnp.int32)}
    got = np.asarray(model.logits(params, model.hidden(params, batch)[0]))
    np.testing.assert_allclose(got[mask > 0], expected[mask > 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_config_written_is_read_by_transformers(case, tmp_path):
    model_type, head, changes = CASES[case]
    theirs = helpers.torch_model(model_type, head, **changes, bos_token_id=3)
    contents = theirs.config.to_diff_dict() | {"architectures": [type(theirs).__name__]}
    family = registry.get(model_type)
    config = family.read_config(contents)
    hash(config)
    written = family.write_config(config, head)
    assert family.read_config(json.loads(json.dumps(written))) == family.read_config(written)
    (tmp_path / "config.json").write_text(json.dumps(written))
    back = transformers.AutoConfig.from_pretrained(tmp_path)
    assert back.architectures == [type(theirs).__name__]
    assert (back.bos_token_id, back.pad_token_id) == (3, 0)
    same = {k: v for k, v in theirs.config.to_dict().items() if k not in ("dtype", "architectures", "_name_or_path")}
    other = back.to_dict()
    if model_type == "gpt2":
        same["n_inner"] = 4 * same["n_embd"]
    if model_type == "qwen2" and not same["use_sliding_window"]:
        other["sliding_window"] = same["sliding_window"]
    assert {k: other.get(k) for k in same} == same


@pytest.mark.parametrize(
    ("model_type", "change", "word"),
    [
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"hidden_act": "sillu"}, "'silu'"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_variants_refused_by_name(model_type, change, word):
    contents = {**(helpers.GPT2 if model_type == "gpt2" else helpers.ROPE), **change}
    with pytest.raises(errors.CheckpointError, match=word):
        registry.get(model_type).read_config(contents)


def test_unknown_family():
    with pytest.raises(errors.CheckpointError, match="llama"):
        registry.get("lama")
