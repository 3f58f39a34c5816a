"""The same adapter on the same tiny random model, once under HF PEFT and once under tunejax: logits and gradients."""

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

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
CLASSES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"num_key_value_heads": 2}, "lm"),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, {}, "mlm"),
}
SITES = {
    "llama": {
        "self_attn.q_proj": "attention/q",
        "self_attn.v_proj": "attention/v",
        "mlp.up_proj": "mlp/up",
        "mlp.down_proj": "mlp/down",
    },
    "bert": {
        "attention.self.query": "attention/q",
        "attention.self.value": "attention/v",
        "intermediate.dense": "mlp/up",
    },
}
FAMILIES = sorted(SITES)


def torch_model(family, folder):
    """A random model, its biases and norms too, written to ``folder``."""
    cls, config, more, _ = CLASSES[family]
    torch.manual_seed(0)
    model = cls(config(**SIZES, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def layers_of(theirs, family):
    """Our path -> PEFT's module of each layer."""
    modules = dict(theirs.named_modules())
    found = {}
    for site, path in SITES[family].items():
        ends = [f"{'layers' if family == 'llama' else 'layer'}.{i}.{site}" for i in range(2)]
        found[f"layers/0/{path}/kernel"] = [next(m for n, m in modules.items() if n.endswith(e)) for e in ends]
    return found


def stacked(layers, arrays, read):
    """{path: {name: [layers, ...]}} of what ``arrays`` reads off each of PEFT's modules."""
    out = {}
    for path, modules in layers.items():
        each = [arrays(m, read) for m in modules]
        out[path] = {k: jnp.asarray(np.stack([e[k] for e in each])) for k in each[0]}
    return out


def value(p):
    return p.detach().numpy()


def gradient(p):
    return p.grad.numpy()


def wrapped(family, folder, config):
    """The model under PEFT, every trained weight moved off its start."""
    config = config(target_modules=list(SITES[family]))
    theirs = peft.get_peft_model(torch_model(family, folder), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return theirs


def check(family, folder, config, spec, train, state=None, shared=None):
    """Asserts that logits, merged logits and all gradients agree.

    config: (target_modules) -> PEFT's config. spec: ours, without targets.
    train, state: (PEFT's module of a site, read) -> its arrays by our names; ``read`` gives a weight or its gradient.
    shared: (PEFT's module of any site) -> what all sites share, frozen.
    """
    theirs = wrapped(family, folder, config)
    layers = layers_of(theirs, family)
    tokens = np.random.default_rng(0).integers(1, 40, (2, 9)).astype(np.int32)
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits
    expected.square().sum().backward()
    expected = expected.detach().numpy()

    head = CLASSES[family][3]
    ours = hf.read_config(folder)
    model = build.build(ours, head=head)
    params, _ = hf.load(folder, ours, head=head)
    method = registry.build({**spec, "targets": [f"{p}/kernel" for p in SITES[family].values()]})
    start = jax.eval_shape(method.init, jax.random.key(0), params)
    adapter = stacked(layers, train, value)
    frozen = stacked(layers, state, value) if state else {}
    if shared:
        frozen["shared"] = {k: jnp.asarray(x) for k, x in shared(next(iter(layers.values()))[0]).items()}
    assert jax.tree.map(jnp.shape, adapter) == jax.tree.map(jnp.shape, start.train)
    assert not frozen or jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, start.state)
    frozen = frozen or jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), start.state)

    @jax.jit
    def logits(p):
        return model.logits(model.head(p), model.hidden(p, models.full_batch(jnp.asarray(tokens)))[0])

    @jax.jit
    def run(adapter):
        found = logits(method.bind(params, adapter, frozen, Context()))
        return jnp.sum(found**2), found

    (_, found), grads = jax.value_and_grad(run, has_aux=True)(adapter)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logits(method.merge(params, adapter, frozen)), expected, atol=1e-5, rtol=1e-5)
    for path, wanted in stacked(layers, train, gradient).items():
        for name, g in wanted.items():
            assert np.abs(g).max() > 1e-3
            limit = 1e-4 * np.abs(g).max()
            np.testing.assert_allclose(grads[path][name], g, rtol=1e-4, atol=limit, err_msg=f"{path} {name}")
