"""(IA)^3 against HF PEFT on Llama and BERT (with biases): logits, gradients, merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import errors, operators
from tunejax.core import method as methods
from tunejax.core import model as models
from tunejax.core.method import Context
from tunejax.interop import hf
from tunejax.methods import bitfit, ia3, registry
from tunejax.models import build

KEY = jax.random.key(0)
COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
LLAMA = {
    "attention/k": "base_model.model.model.layers.{}.self_attn.k_proj",
    "attention/v": "base_model.model.model.layers.{}.self_attn.v_proj",
    "mlp/down": "base_model.model.model.layers.{}.mlp.down_proj",
}
BERT = {
    "attention/k": "base_model.model.bert.encoder.layer.{}.attention.self.key",
    "attention/v": "base_model.model.bert.encoder.layer.{}.attention.self.value",
    "attention/o": "base_model.model.bert.encoder.layer.{}.attention.output.dense",
    "mlp/down": "base_model.model.bert.encoder.layer.{}.output.dense",
}
CASES = {
    "llama": ("Llama", "lm", LLAMA, ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bert": ("Bert", "mlm", BERT, ["key", "value", "output.dense"], ["output.dense"]),
}


@pytest.mark.parametrize("name", CASES)
def test_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, head, sites, targets, feedforward = CASES[name]
    spec = {"target_modules": targets, "feedforward_modules": feedforward}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON)
    kind = {"lm": "ForCausalLM", "mlm": "ForMaskedLM"}[head]
    theirs = getattr(transformers, family + kind)(config).eval()
    with torch.no_grad():
        for key, w in theirs.named_parameters():
            if key.endswith("bias"):
                w.copy_(torch.randn_like(w) * 0.3)
    theirs.save_pretrained(tmp_path)
    theirs = peft.get_peft_model(theirs, peft.IA3Config(**spec)).eval()
    weights = {k: v for k, v in theirs.named_parameters() if "ia3_l" in k}
    assert len(weights) == 2 * len(sites)
    with torch.no_grad():
        for w in weights.values():
            w.copy_(1 + 0.5 * torch.randn_like(w))
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits
    expected.square().mean().backward()

    ours = hf.read_config(tmp_path)
    model = build.build(ours, head=head)
    params, _ = hf.load(tmp_path, ours, head=head)
    method = registry.build({"name": "ia3", **spec})
    train = method.init(KEY, params).train
    adapter, wanted = jax.tree.map(lambda x: None, train), jax.tree.map(lambda x: None, train)
    for site, module in sites.items():
        (field,) = train[f"layers/0/{site}/kernel"]
        both = [weights[f"{module.format(i)}.ia3_l.default"] for i in range(2)]
        adapter[f"layers/0/{site}/kernel"][field] = jnp.stack([jnp.asarray(w.detach().numpy().ravel()) for w in both])
        wanted[f"layers/0/{site}/kernel"][field] = np.stack([w.grad.numpy().ravel() for w in both])
    assert jax.tree.map(jnp.shape, adapter) == jax.tree.map(jnp.shape, train)

    def logits(p):
        return model.logits(model.head(p), model.hidden(p, models.full_batch(jnp.asarray(tokens)))[0])

    @jax.jit
    def run(adapter):
        found = logits(method.bind(params, adapter, {}, Context()))
        return jnp.mean(found**2), found

    (_, found), grads = jax.value_and_grad(run, has_aux=True)(adapter)
    expected = expected.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(logits)(method.merge(params, adapter, {})), expected, atol=1e-5, rtol=1e-5)
    for path, arrays in wanted.items():
        for field, expected in arrays.items():
            np.testing.assert_allclose(grads[path][field], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_identity_at_the_start():
    m, p = tiny.model(tiny.BERT, "mlm"), tiny.params(tiny.BERT, "mlm")
    start = ia3.ia3().init(KEY, p)
    assert {k: list(x) for k, x in start.train.items()} == {
        "layers/0/attention/k/kernel": ["after"],
        "layers/0/attention/v/kernel": ["after"],
        "layers/0/mlp/down/kernel": ["before"],
    }
    assert not start.edits
    np.testing.assert_array_equal(tiny.outputs(m, p), tiny.outputs(m, ia3.ia3().bind(p, start.train, {}, Context())))


@pytest.mark.parametrize("first", [True, False])
def test_biases_are_scaled_wherever_they_train(first):
    m, p = tiny.model(tiny.BERT, "mlm"), tiny.params(tiny.BERT, "mlm")
    both = [ia3.ia3(), bitfit.bitfit("attention/v/bias")]
    method = methods.chain(*(both if first else both[::-1]))
    start = method.init(KEY, p)
    train = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), start.train)
    base = methods.apply_edits(p, start.edits)
    bound = tiny.outputs(m, method.bind(base, train, start.state, Context()))
    merged = method.merge(base, train, start.state)
    np.testing.assert_allclose(bound, tiny.outputs(m, merged), atol=1e-5, rtol=1e-5)
    v = merged["layers"]["0"]["attention"]["v"]
    assert np.abs(v["bias"] - train["1:bitfit" if first else "0:bitfit"]["layers/0/attention/v/bias"]).max() > 1e-2


def test_the_formula_nested():
    w = jax.random.normal(KEY, (4, 5))
    inner = ia3.Scaled(w, after=jnp.arange(5.0))
    outer = ia3.Scaled(inner, before=jnp.arange(4.0), after=jnp.full(5, 2.0))
    x, bias = jnp.ones((3, 4)), jnp.ones(5)
    expected = 2 * np.arange(5.0) * ((np.ones((3, 4)) * np.arange(4.0)) @ np.asarray(w) + 1)
    np.testing.assert_allclose(outer(x, bias), expected, rtol=1e-5)
    np.testing.assert_allclose(x @ outer.dense() + operators.dense_bias(outer, bias), expected, rtol=1e-5, atol=1e-6)


def test_axes_and_layers():
    method = ia3.ia3(layers="-1:")
    assert method.cuts(3) == (2,)
    train = jax.eval_shape(method.init, KEY, tiny.params(cuts=(2,))).train
    axes = method.axes(tiny.model(cuts=(2,)).axes, train)
    assert axes["layers/1/attention/k/kernel"] == {"after": ("layers", "kv")}
    assert axes["layers/1/mlp/down/kernel"] == {"before": ("layers", "mlp")}
    assert train["layers/1/mlp/down/kernel"]["before"].shape == (1, 24)


def test_feedforward_is_a_part_of_the_targets():
    with pytest.raises(errors.TargetError, match=r"feedforward 'mlp/up/kernel' matches none"):
        ia3.ia3(feedforward=["mlp/up/kernel"]).init(KEY, tiny.params())
    start = ia3.ia3("mlp/{up,down}/kernel", feedforward=[]).init(KEY, tiny.params())
    assert {next(iter(x)) for x in start.train.values()} == {"after"}
