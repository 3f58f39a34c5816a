"""Gates against their formulas in numpy, around LoRA, adapters and a prefix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from branches import noisy

from tunejax.core import errors, operators, paths, sites
from tunejax.core.method import Context, apply_edits
from tunejax.core.model import full_batch
from tunejax.generate import decode
from tunejax.methods import registry, report

KEY = jax.random.key(0)
Q, DOWN, SLOT = "layers/0/attention/q/kernel", "layers/0/mlp/down/kernel", "layers/0/attention/prefix"
LORA = {"name": "lora", "rank": 2, "targets": "attention/q/kernel"}
UNIPELT = {"name": "unipelt", "length": 3, "rank": 2, "width": 4}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer(spec, path, config=tiny.LLAMA, head="lm"):
    """(the plain kernel of layer 1, the operator that stands there, what trains there), all trained off their start."""
    p, method = tiny.params(config, head), registry.build(spec)
    train = noisy(method.init(KEY, p).train)
    bound = method.bind(p, train, {}, Context())
    one = jax.tree.map(lambda x: x[1], (paths.get(p, path), paths.get(bound, path)))
    return *one, jax.tree.map(lambda x: np.asarray(x[1]), {**train["method"][path], **train["gates"][path]})


@pytest.mark.parametrize("reads", ["input", "output"])
def test_lora_behind_a_gate(reads):
    kernel, op, t = layer({"name": "gated", "method": {**LORA, "alpha": 6}, "reads": reads}, Q)
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    h = x @ np.asarray(kernel)
    gate = sigmoid((x if reads == "input" else h) @ t["gate"] + t["gate_bias"])
    np.testing.assert_allclose(op(jnp.asarray(x)), h + gate[..., None] * 3 * x @ t["a"] @ t["b"], atol=1e-4)


def test_whatever_adds_to_a_kernel_may_stand_behind_a_gate():
    kernel, op, t = layer({"name": "gated", "method": {"name": "miss", "rank": 3, "targets": "attention/q/kernel"}}, Q)
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    gate = sigmoid(x @ t["gate"] + t["gate_bias"])
    change = x @ np.tile(t["b"], (6, 1))[:16]
    np.testing.assert_allclose(op(jnp.asarray(x)), x @ np.asarray(kernel) + gate[..., None] * change, atol=1e-4)


def test_an_adapter_behind_a_gate_that_reads_what_the_adapter_reads():
    spec = {"name": "gated", "method": {"name": "pfeiffer", "width": 3}, "reads": "output"}
    kernel, op, t = layer(spec, DOWN, tiny.BERT, "mlm")
    rng = np.random.default_rng(0)
    x, bias = rng.standard_normal((5, 24)).astype(np.float32), rng.standard_normal(16).astype(np.float32)
    h = x @ np.asarray(kernel) + bias
    change = np.maximum(h @ t["down"] + t["down_bias"], 0) @ t["up"] + t["up_bias"]
    gate = sigmoid(h @ t["gate"] + t["gate_bias"])
    np.testing.assert_allclose(op(jnp.asarray(x), jnp.asarray(bias)), h + gate[:, None] * change, atol=1e-4)


@pytest.mark.parametrize("reads", ["input", "output"])
def test_a_gate_of_rows_is_the_mean_over_all_their_tokens(reads):
    kernel, op, t = layer({"name": "gated", "method": LORA, "reads": reads, "per": "row"}, Q)
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    h = x @ np.asarray(kernel)
    gate = sigmoid((x if reads == "input" else h) @ t["gate"] + t["gate_bias"]).mean(1)
    np.testing.assert_allclose(op(jnp.asarray(x)), h + gate[:, None, None] * 8 * x @ t["a"] @ t["b"], atol=1e-4)


@pytest.mark.parametrize("per", ["token", "row"])
@pytest.mark.parametrize("reads", ["sum", "residual"])
def test_an_adapter_where_a_branch_joins_and_its_gate_read_the_same(reads, per):
    spec = {"name": "gated", "method": {"name": "pfeiffer", "width": 3, "reads": reads}, "per": per}
    p, method = tiny.params(), registry.build(spec)
    train = noisy(method.init(KEY, p).train)
    slot = DOWN.replace("down/kernel", "join")
    assert train["gates"][slot]["gate"].shape == (3, 16)
    op = jax.tree.map(lambda x: x[1], paths.get(method.bind(p, train, {}, Context()), slot))
    t = jax.tree.map(lambda x: np.asarray(x[1]), {**train["method"][DOWN], **train["gates"][slot]})
    branch, x = np.random.default_rng(0).standard_normal((2, 2, 5, 16)).astype(np.float32)
    r = np.tanh(branch + x) if reads == "sum" else x
    change = np.maximum(r @ t["down"] + t["down_bias"], 0) @ t["up"] + t["up_bias"]
    gate = sigmoid(r @ t["gate"] + t["gate_bias"])
    gate = gate.mean(1, keepdims=True) if per == "row" else gate
    found = op.joined(jnp.asarray(branch), jnp.asarray(x), jnp.tanh)
    np.testing.assert_allclose(found, branch + gate[..., None] * change, atol=1e-4)
    with pytest.raises(errors.NotLinear, match="mlp/join"):
        method.merge(p, train, {})


def test_keys_and_values_behind_a_gate_of_rows():
    p = tiny.params()
    method = registry.build({"name": "gated", "method": {"name": "prefix_tuning", "length": 3}, "per": "row"})
    train = noisy(method.init(KEY, p).train)
    one = jax.tree.map(lambda x: x[1], paths.get(method.bind(p, train, {}, Context()), SLOT))
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    gate = sigmoid(x @ np.asarray(one.gate) + float(one.gate_bias)).mean(1)[:, None, None]
    assert sites.strength(one, jnp.asarray(x)) is None
    for found, plain in zip(sites.pair(one, jnp.asarray(x), 4), (one.key, one.value), strict=True):
        np.testing.assert_allclose(found, (gate * np.asarray(plain)).reshape(2, 3, 2, 4), atol=1e-5)


def test_a_gate_of_rows_sees_later_tokens_and_padding():
    """As AdapterHub's does; a gate of tokens does not."""
    m, p, tokens = tiny.model(), tiny.params(), np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    for per, same in (("token", True), ("row", False)):
        method = registry.build({**UNIPELT, "per": per})
        start = method.init(KEY, p)
        bound = method.bind(p, noisy(start.train), start.state, Context())
        run = jax.jit(lambda x, q=bound: m.logits(m.head(q), m.hidden(q, full_batch(x))[0]))
        one, two = run(tokens)[:, :5], run(np.concatenate([tokens[:, :5], tokens[:, :1]], 1))[:, :5]
        assert np.allclose(one, two, atol=1e-6) == same


def test_a_gated_prefix_is_weighed_in_the_softmax():
    """One head, by hand: σ times the exponential of each score of the prefix."""
    rng = np.random.default_rng(0)
    q, k, v, pk, pv = (rng.standard_normal((n, 4)).astype(np.float32) for n in (5, 5, 5, 3, 3))
    gate = sigmoid(rng.standard_normal(5)).astype(np.float32)
    text = np.exp(q @ k.T / 2) * np.tri(5)
    front = gate[:, None] * np.exp(q @ pk.T / 2)
    expected = (front @ pv + text @ v) / (front.sum(1) + text.sum(1))[:, None]
    where = sites.Where(jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32))
    found = sites.attention(
        *(jnp.asarray(x)[None, :, None] for x in (q, k, v)), where, where, causal=True,
        prefix=(jnp.asarray(pk)[:, None], jnp.asarray(pv)[:, None]), strength=jnp.log(gate)[None],
    )  # fmt: skip
    np.testing.assert_allclose(found[0, :, 0], expected, atol=1e-5)


def test_the_prefix_reads_its_gate_and_a_closed_one_is_no_prefix():
    m, p = tiny.model(tiny.BERT, "mlm"), tiny.params(tiny.BERT, "mlm")
    method = registry.build({"name": "gated", "method": {"name": "prefix_tuning", "length": 3}})
    assert method.prefix == 3
    train = noisy(method.init(KEY, p).train)
    gates = train["gates"][SLOT]
    assert gates["gate"].shape == (3, 16)
    closed = {"gate": jnp.zeros((3, 16)), "gate_bias": jnp.full((3,), -1e4)}
    outputs = [
        tiny.outputs(m, method.bind(p, {**train, "gates": {SLOT: g}}, {}, Context()))
        for g in (closed, gates, {**gates, "gate": -gates["gate"]})
    ]
    # Positions are counted from behind the prefix even so, hence the reference's too. Padding is left out.
    shift = paths.replace(p, {"positions/table": jnp.roll(p["positions"]["table"], -3, axis=0)})
    real = tiny.batch()["segment_ids"] > 0
    np.testing.assert_allclose(outputs[0][real], tiny.outputs(m, shift)[real], atol=1e-5)
    assert np.abs(outputs[1] - outputs[2]).max() > 1e-3


def test_unipelt_is_three_gated_methods_with_what_the_paper_reads():
    method = registry.build(UNIPELT)
    assert [m.name for m in method.parts] == ["gated_lora", "gated_prefix_tuning", "gated_pfeiffer"]
    p = tiny.params()
    start = method.init(KEY, p)
    shapes = jax.tree.map(jnp.shape, {k: t["gates"] for k, t in start.train.items()})
    v = Q.replace("/q/", "/v/")
    alone = {"gate": (3, 16), "gate_bias": (3,)}
    assert list(shapes.values()) == [{Q: alone, v: alone}, {SLOT: alone}, {DOWN: alone}]
    assert not any(x.any() for t in start.train.values() for x in jax.tree.leaves(t["gates"]))
    found = report.describe(method, p, start)
    assert found.trained == sum(x.size for x in jax.tree.leaves(start.train))
    axes = method.axes(tiny.model().axes, start.train)
    assert axes["0:gated_lora"]["gates"][Q] == {"gate": ("layers", None), "gate_bias": ("layers",)}


@pytest.mark.parametrize(("config", "head"), [(tiny.LLAMA, "lm"), (tiny.BERT, "mlm")])
def test_the_identity_but_for_the_prefix(config, head):
    m, p = tiny.model(config, head), tiny.params(config, head)
    method = registry.build(UNIPELT)
    start = method.init(KEY, p)
    bound = method.bind(apply_edits(p, start.edits), start.train, start.state, Context())
    np.testing.assert_allclose(tiny.outputs(m, p), tiny.outputs(m, paths.replace(bound, {SLOT: None})), atol=1e-6)
    shapes = jax.eval_shape(method.init, KEY, p)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), start)


def test_cached_decoding_agrees_so_no_gate_sees_a_later_token():
    m, p = tiny.model(), tiny.params()
    method = registry.build(UNIPELT)
    start = method.init(KEY, p)
    bound = method.bind(p, noisy(start.train), start.state, Context())
    tokens = np.random.default_rng(0).integers(1, 31, (2, 6)).astype(np.int32)
    new = np.asarray(decode.generate(m, bound, tokens, max_new_tokens=4))
    whole = np.concatenate([tokens, new], 1)
    logits = jax.jit(lambda p, x: m.logits(m.head(p), m.hidden(p, full_batch(x))[0]))(bound, whole)
    np.testing.assert_array_equal(new, np.asarray(logits).argmax(-1)[:, 5:-1])


def test_a_gate_is_not_merged():
    p, method = tiny.params(), registry.build({"name": "gated", "method": LORA})
    with pytest.raises(errors.NotLinear, match=Q):
        method.merge(p, method.init(KEY, p).train, {})
    assert operators.is_operator(paths.get(method.bind(p, method.init(KEY, p).train, {}, Context()), Q))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"method": LORA, "reads": "inputs"}, "Did you mean 'input'"),
        ({"method": LORA, "per": "rows"}, "Did you mean 'row'"),
        ({"method": [LORA, {"name": "bitfit"}]}, "is a chain"),
        ({"method": {"name": "bitfit"}}, "bitfit adds nothing"),
        ({"method": {"name": "lora", "rnk": 2}}, "Did you mean 'rank'"),
        ({"method": 3}, "method: expected"),
        ({}, "method: required"),
    ],
)
def test_what_cannot_be_gated(spec, said):
    with pytest.raises(errors.TunejaxError, match=said):
        registry.build({"name": "gated", **spec}).init(KEY, tiny.params())
