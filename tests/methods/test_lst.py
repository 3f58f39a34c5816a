"""Ladder side-tuning against its formula in numpy; what the backward pass leaves out; runs, caches, segments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from branches import noisy

from tunejax.core import errors, paths
from tunejax.core.method import Context
from tunejax.core.model import full_batch
from tunejax.generate import decode
from tunejax.methods import registry
from tunejax.models import build
from tunejax.objectives import causal_lm

KEY, SPEC = jax.random.key(0), {"name": "lst", "reduction_factor": 2}


def trained(config=tiny.LLAMA, head="lm", cuts=()):
    """(method, model, parameters, what trains off its start)."""
    method, p = registry.build(SPEC), tiny.params(config, head, cuts)
    return method, tiny.model(config, head, cuts), p, noisy(method.init(KEY, p).train, 0.2)


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def turned(x, theta=10000.0):
    """x [length, heads, dim] by the angles of positions 0, 1, ...: pairs as complex numbers."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def block(b, x, heads=4, kv=2):
    """A block of Llama for one row x [length, width]."""
    y = rms(x, b["attention"]["norm"]["scale"])
    q, k, v = (
        (y @ b["attention"][n]["kernel"]).reshape(len(x), h, -1) for n, h in (("q", heads), ("k", kv), ("v", kv))
    )
    q, k, v = turned(q), turned(k).repeat(heads // kv, 1), v.repeat(heads // kv, 1)
    scores = np.exp(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])) * np.tri(len(x))
    out = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(len(x), -1)
    x = x + out @ b["attention"]["o"]["kernel"]
    y = rms(x, b["mlp"]["norm"]["scale"])
    gate = y @ b["mlp"]["gate"]["kernel"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ b["mlp"]["up"]["kernel"])) @ b["mlp"]["down"]["kernel"]


def test_the_formula():
    method, m, p, train = trained()
    tokens = np.random.default_rng(0).integers(1, 31, (1, 6)).astype(np.int32)
    batch = full_batch(jnp.asarray(tokens))
    tapped = jax.jit(lambda p: m.hidden(p, batch, taps=("hidden",)))
    states = np.asarray(tapped(p)[1]["hidden"], np.float64)[:, 0]
    t = jax.tree.map(lambda x: np.asarray(x, np.float64), train["ladder"])
    s = np.asarray(p["embed"]["table"], np.float64)[tokens[0]] @ t["first"]
    for i, h in enumerate(states):
        mu = 1 / (1 + np.exp(-t["gate"][i] / 0.1))
        s = block(jax.tree.map(lambda x, i=i: x[i], t["blocks"]), mu * h @ t["down"][i] + (1 - mu) * s)
    expected = rms(states[-1] + s @ t["up"], np.asarray(p["norm"]["scale"]))
    found, taps = tapped(method.bind(p, train, {}, Context()))
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    np.testing.assert_allclose(taps["hidden"][:, 0], states, atol=1e-5)


@pytest.mark.parametrize("config", [tiny.QWEN3, tiny.GPT2], ids=lambda x: x.family)
def test_it_starts_as_the_model_with_blocks_cut_out_of_its_own(config):
    """Llama's and BERT's are among the laws."""
    m, p, method = tiny.model(config), tiny.params(config), registry.build(SPEC)
    start = method.init(KEY, p)
    bound = method.bind(p, start.train, start.state, Context())
    np.testing.assert_allclose(tiny.outputs(m, bound), tiny.outputs(m, p), atol=1e-6)
    blocks = paths.flatten(start.train["ladder"]["blocks"])
    for path, x in paths.flatten(p["layers"]["0"]).items():
        if x is None:
            assert blocks[path] is None
        else:
            np.testing.assert_array_equal(blocks[path], x[:, ::2, ::2] if x.ndim == 3 else x[:, ::2])
    assert not start.edits
    shapes = jax.eval_shape(method.init, KEY, p)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), start)


def test_segments_change_nothing():
    _, _, _, train = trained()
    outputs = []
    for cuts in ((), (1,)):
        method, m, p, _ = trained(cuts=cuts)
        outputs.append(tiny.outputs(m, method.bind(p, train, {}, Context())))
        assert jax.tree.structure(method.init(KEY, p).train) == jax.tree.structure(train)
    np.testing.assert_allclose(*outputs, atol=1e-5)


def products(jaxpr, sizes):
    """How often a product takes an operand with axes of these two sizes, whatever it is nested in."""
    count = 0
    for e in jaxpr.eqns:
        shapes = [tuple(v.aval.shape) for v in e.invars if hasattr(v, "aval")]
        count += e.primitive.name == "dot_general" and any(sorted(s) == sorted(sizes) for s in shapes)
        for inner in jax.core.jaxprs_in_params(e.params):
            count += products(inner, sizes)
    return count


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_backward_pass_leaves_the_model_out(remat):
    """MLP kernels are 16 by 24 in the model and 8 by 12 in the ladder."""
    p, batch, counts = tiny.params(), tiny.lm_batch(), {}
    m = build.build(tiny.LLAMA, head="lm", remat=remat)
    for name, spec in {"lst": SPEC, "lora": {"name": "lora", "rank": 1, "targets": "mlp/down/kernel"}}.items():
        method = registry.build(spec)

        def loss(train, method=method):
            return causal_lm.make().loss(m, method.bind(p, train, {}, Context()), {}, batch, Context())[0]

        train = method.init(KEY, p).train
        forward, both = jax.make_jaxpr(loss)(train), jax.make_jaxpr(jax.grad(loss))(train)
        counts[name] = [products(j.jaxpr, s) for s in ((16, 24), (8, 12)) for j in (forward, both)]
    assert counts["lst"][0] == counts["lst"][1] > 0
    assert counts["lst"][3] > counts["lst"][2] > 0
    assert counts["lora"][1] > counts["lora"][0]


def test_it_keeps_less_than_what_passes_through_the_model():
    config = dataclasses.replace(tiny.LLAMA, embed_dim=64, head_dim=16, mlp_dim=256, num_layers=4)
    m, batch, kept = build.build(config, head="lm"), tiny.lm_batch(4, 24), {}
    p = jax.eval_shape(m.init, KEY)
    for name, spec in {
        "lst": {"name": "lst"},
        "lora": {"name": "lora", "rank": 1, "targets": "attention/q/kernel"},
    }.items():
        method = registry.build(spec)

        def gradients(train, p, method=method):
            def loss(train):
                return jnp.sum(m.hidden(method.bind(p, train, {}, Context()), batch)[0] ** 2)

            return jax.grad(loss)(train)

        train = jax.eval_shape(method.init, KEY, p).train
        kept[name] = jax.jit(gradients).lower(train, p).compile().memory_analysis().temp_size_in_bytes
    assert kept["lst"] < 0.6 * kept["lora"], kept


def test_cached_decoding():
    method, m, p, train = trained()
    bound = method.bind(p, train, {}, Context())
    tokens = np.random.default_rng(0).integers(1, 31, (2, 6)).astype(np.int32)
    mask = np.array([[1] * 6, [0, 0] + [1] * 4])
    new = np.asarray(decode.generate(m, bound, tokens, mask, max_new_tokens=5))
    logits = jax.jit(lambda p, t, k: m.logits(m.head(p), m.hidden(p, full_batch(t, k))[0]))
    whole, seen = np.concatenate([tokens, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
    np.testing.assert_array_equal(new, np.asarray(logits(bound, whole, seen)).argmax(-1)[:, 5:-1])


def test_the_kernel_behind_a_gate_is_the_models():
    p = tiny.params()
    alone = registry.build(SPEC).init(KEY, p).train["ladder"]["blocks"]
    above = registry.build([{"name": "gated", "method": {"name": "lora", "rank": 2}}, SPEC]).init(KEY, p)
    jax.tree.map(np.testing.assert_array_equal, above.train["1:lst"]["ladder"]["blocks"], alone)


def test_above_other_methods_and_what_is_refused():
    p = tiny.params()
    for first in ({"name": "quantize"}, {"name": "prefix_tuning", "length": 2}, {"name": "parallel_adapter"}):
        start = registry.build([first, SPEC]).init(KEY, p)
        assert paths.flatten(start.train["1:lst"]["ladder"]["blocks"])["attention/prefix"] is None
    method = registry.build(SPEC)
    with pytest.raises(errors.NotLinear, match="ladder"):
        method.merge(p, method.init(KEY, p).train, {})
    with pytest.raises(errors.TargetError, match="another method fill it"):
        registry.build([SPEC, SPEC]).init(KEY, p)
    with pytest.raises(errors.ConfigError, match="at least 1"):
        registry.build({**SPEC, "reduction_factor": 0})
    for factor, said in ((3, "embed_dim is 16"), (1000, "embed_dim is 16"), (16, "mlp_dim is 24")):
        with pytest.raises(
            errors.ConfigError, match=f"lst: reduction_factor is {factor}, and {said}; expected one that"
        ):
            jax.eval_shape(registry.build({**SPEC, "reduction_factor": factor}).init, KEY, p)
    method = registry.build({**SPEC, "reduction_factor": 4})
    with pytest.raises(errors.ConfigError, match=r"by 4, which .*head_dim 4"):
        jax.eval_shape(
            lambda: tiny.model().hidden(method.bind(p, method.init(KEY, p).train, {}, Context()), tiny.batch())
        )
