"""LoRA against HF PEFT: the same adapter gives the same logits and gradients, merged or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.core import model as models
from tunejax.core.method import Context
from tunejax.interop import hf
from tunejax.methods import registry
from tunejax.models import build

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SITES = {
    "self_attn.q_proj": "attention/q",
    "self_attn.v_proj": "attention/v",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
}
SPEC = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_logits_and_gradients(use_rslora, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**SPEC, use_rslora=use_rslora)).eval()
    weights = {k: v for k, v in theirs.named_parameters() if "lora_" in k}
    with torch.no_grad():
        for w in weights.values():
            w.copy_(torch.randn_like(w) * 0.3)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits
    expected.square().sum().backward()

    ours = hf.read_config(tmp_path)
    model = build.build(ours, head="lm")
    params, _ = hf.load(tmp_path, ours, head="lm")
    method = registry.build({"name": "lora", **SPEC, "use_rslora": use_rslora})
    train = method.init(jax.random.key(0), params).train
    adapter = jax.tree.map(lambda x: None, train)
    for site, path in SITES.items():
        for theirs_name, name in (("lora_A", "a"), ("lora_B", "b")):
            stacked = [_weight(weights, i, site, theirs_name).detach().numpy().T for i in range(2)]
            adapter[f"layers/0/{path}/kernel"][name] = jnp.asarray(np.stack(stacked))
    assert jax.tree.map(jnp.shape, adapter) == jax.tree.map(jnp.shape, train)

    def logits(p):
        return model.logits(model.head(p), model.hidden(p, models.full_batch(jnp.asarray(tokens)))[0])

    @jax.jit
    def run(adapter):
        found = logits(method.bind(params, adapter, {}, Context()))
        return jnp.sum(found**2), found

    (_, found), grads = jax.value_and_grad(run, has_aux=True)(adapter)
    expected = expected.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logits(method.merge(params, adapter, {})), expected, atol=1e-5, rtol=1e-5)
    for site, path in SITES.items():
        theirs_grad = _weight(weights, 1, site, "lora_A").grad.numpy().T
        ours_grad = grads[f"layers/0/{path}/kernel"]["a"][1]
        np.testing.assert_allclose(ours_grad, theirs_grad, rtol=1e-3, atol=1e-3 * np.abs(theirs_grad).max())


def _weight(weights, layer, site, name):
    return weights[f"base_model.model.model.layers.{layer}.{site}.{name}.default.weight"]
