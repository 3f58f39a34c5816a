"""Chains that HF PEFT's one adapter a module cannot hold, and embedding tables that a head shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.core import errors
from tunejax.core.method import Context, apply_edits
from tunejax.core.model import full_batch
from tunejax.interop import found as found_lib
from tunejax.interop import hf, peft_read
from tunejax.interop import peft as ours
from tunejax.methods import registry
from tunejax.models import build

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
SIZES = {"vocab_size": 40, "initializer_range": 0.2}
MAKE = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=32, tie_word_embeddings=True, **SIZES,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, **SIZES)
    ),
}  # fmt: skip
QUERIES = {"llama": "q_proj", "gpt2": "c_attn"}
TABLES = {"llama": "embed_tokens", "gpt2": "wte"}


@pytest.fixture(params=MAKE, scope="module")
def tied(request, tmp_path_factory):
    """(family, folder of a random model whose head shares the embedding table)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    MAKE[request.param]().save_pretrained(folder)
    return request.param, folder


def their_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def our_logits(config, method, base, train, state):
    model = build.build(config, head="lm", cuts=method.cuts(config.num_layers))
    bound = method.bind(base, train, state, Context())
    return model.logits(model.head(bound), model.hidden(bound, full_batch(jnp.asarray(TOKENS)))[0])


def tuned(folder, specs):
    """(config, what `ours.write` takes) of a method whose arrays are off their start."""
    config, method = hf.read_config(folder), registry.build(specs)
    params, _ = hf.load(folder, config, head="lm", cuts=method.cuts(config.num_layers))
    start = method.init(jax.random.key(0), params)
    rng = np.random.default_rng(1)
    train = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), start.train)
    return config, ours.Tuned(specs, method, apply_edits(params, start.edits), train, start.state)


CHAINS = {
    "the same kernel": [
        {"name": "lora", "rank": 2, "targets": "attention/{q,v}/kernel"},
        {"name": "lora", "rank": 3, "targets": "attention/q/kernel"},
    ],
    "parts of one module": [
        {"name": "lora", "rank": 2, "targets": "attention/q/kernel"},
        {"name": "lora", "rank": 3, "targets": "attention/v/kernel"},
    ],
    "whole and adapted": [
        {"name": "full", "targets": "attention/q/kernel"},
        {"name": "lora", "rank": 2, "targets": "attention/v/kernel"},
    ],
}


@pytest.mark.parametrize("kind", CHAINS)
def test_two_at_one_module_are_refused(tied, kind, tmp_path):
    family, folder = tied
    config, found = tuned(folder, CHAINS[kind])
    if family == "llama" and kind != "the same kernel":
        ours.write(tmp_path / "out", found, config, head="lm", base_name=str(folder))
        theirs = peft.PeftModel.from_pretrained(their_model(folder), tmp_path / "out").eval()
        mine = our_logits(config, found.method, found.base, found.train, found.state)
        np.testing.assert_allclose(their_logits(theirs), mine, atol=1e-5, rtol=1e-5)
        return
    with pytest.raises(errors.ConfigError, match=r"one adapter a module|whole modules only|PEFT can do one"):
        ours.write(tmp_path / "out", found, config, head="lm", base_name=str(folder))
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_alone_does_not_keep_two_apart(tied, tmp_path):
    _, folder = tied
    specs = [
        {"name": "lora_plus", "rank": 2, "ratio": 4.0, "targets": "mlp/up/kernel"},
        {"name": "lora", "rank": 2, "targets": "mlp/down/kernel"},
    ]
    config, found = tuned(folder, specs)
    ours.write(tmp_path / "out", found, config, head="lm", base_name=str(folder))
    theirs = peft.PeftModel.from_pretrained(their_model(folder), tmp_path / "out").eval()
    mine = our_logits(config, found.method, found.base, found.train, found.state)
    np.testing.assert_allclose(their_logits(theirs), mine, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings=True`"
)
def test_a_table_that_trains_is_the_heads_too(tied, tmp_path):
    _, folder = tied
    specs = [{"name": "full", "targets": "embed/table"}, {"name": "lora", "rank": 2, "targets": "mlp/up/kernel"}]
    config, found = tuned(folder, specs)
    ours.write(tmp_path / "out", found, config, head="lm", base_name=str(folder))
    theirs = peft.PeftModel.from_pretrained(their_model(folder), tmp_path / "out").eval()
    mine = our_logits(config, found.method, found.base, found.train, found.state)
    np.testing.assert_allclose(their_logits(theirs), mine, atol=1e-5, rtol=1e-5)
    back = peft_read.read(tmp_path / "out", config, head="lm")
    method = registry.build(back.specs)
    params, _ = hf.load(folder, config, head="lm")
    start = method.init(jax.random.key(0), params)
    train = found_lib.trained(back, method, start.train, ())
    np.testing.assert_allclose(
        our_logits(config, method, apply_edits(params, start.edits), train, start.state), mine, atol=1e-5, rtol=1e-5
    )


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings=True`"
)
def test_a_table_that_trained_apart_from_its_head_is_refused(tied, tmp_path):
    family, folder = tied
    config = peft.LoraConfig(
        r=2, target_modules=[QUERIES[family]], modules_to_save=[TABLES[family]], fan_in_fan_out=family == "gpt2"
    )
    theirs = peft.get_peft_model(their_model(folder), config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(errors.CheckpointError, match=rf"{TABLES[family]} trained apart from lm_head"):
        peft_read.read(tmp_path, hf.read_config(folder), head="lm")
