import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import errors, low_rank, operators, paths
from tunejax.core.method import Context
from tunejax.methods import lora

KEY = jax.random.key(0)
Q = "layers/0/attention/q/kernel"


def test_start():
    p = tiny.params()
    start = lora.lora(rank=4).init(KEY, p)
    assert set(start.train) == {k for k in paths.flatten(p) if k.startswith("layers/") and k.endswith("kernel")}
    a, b = start.train[Q]["a"], start.train[Q]["b"]
    assert (a.shape, b.shape) == ((3, 16, 4), (3, 4, 16))
    assert not b.any()
    assert np.abs(a).max() <= 1 / np.sqrt(16)
    np.testing.assert_allclose(np.std(a), 1 / np.sqrt(16) / np.sqrt(3), rtol=0.1)
    other = start.train["layers/0/attention/v/kernel"]["a"]
    assert not np.array_equal(a, other)


def test_identity_at_the_start_and_merge_equals_bind():
    m, p = tiny.model(), tiny.params()
    method = lora.lora(rank=3, alpha=6.0, dropout=0.5)
    start = method.init(KEY, p)
    np.testing.assert_array_equal(
        tiny.outputs(m, p), tiny.outputs(m, method.bind(p, start.train, {}, Context(train=False)))
    )
    train = jax.tree.map(lambda x: x + 0.05, start.train)
    bound = tiny.outputs(m, method.bind(p, train, {}, Context()))
    np.testing.assert_allclose(bound, tiny.outputs(m, method.merge(p, train, {})), atol=1e-5)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_the_formula(rslora, scale):
    kernel = jax.random.normal(KEY, (5, 7))
    method = lora.lora("w/kernel", rank=4, alpha=6, rslora=rslora)
    train = {"w/kernel": {"a": jnp.full((5, 4), 0.1), "b": jnp.full((4, 7), 0.2)}}
    op = method.bind({"w": {"kernel": kernel}}, train, {}, Context())["w"]["kernel"]
    x, bias = jnp.arange(10.0).reshape(2, 5), jnp.ones(7)
    expected = x @ kernel + 1 + scale * (x @ train["w/kernel"]["a"]) @ train["w/kernel"]["b"]
    np.testing.assert_allclose(op(x, bias), expected, rtol=1e-5)
    np.testing.assert_allclose(x @ op.dense() + 1, expected, rtol=1e-5, atol=1e-5)
    assert op.shape == (5, 7)


def test_dropout_has_a_key_of_its_own_in_every_layer_and_site():
    m, p = tiny.model(), tiny.params()
    method = lora.lora("attention/{q,v}/kernel", dropout=0.5)
    train = jax.tree.map(lambda x: x + 0.1, method.init(KEY, p).train)
    ctx = Context(key=KEY, train=True)
    bound = method.bind(p, train, {}, ctx)
    keys = [jax.random.key_data(paths.get(bound, f"layers/0/attention/{s}/kernel").key) for s in "qv"]
    assert len({bytes(k) for rows in keys for k in np.asarray(rows)}) == 6
    assert method.bind(p, train, {}, ctx._replace(train=False))["layers"]["0"]["attention"]["q"]["kernel"].key is None
    out = [tiny.outputs(m, method.bind(p, train, {}, ctx._replace(key=jax.random.key(i)))) for i in (0, 0, 1)]
    np.testing.assert_array_equal(out[0], out[1])
    assert np.abs(out[0] - out[2]).max() > 1e-4


def test_dropout_keeps_the_mean():
    x = jnp.ones((1000, 10))
    dropped = low_rank.drop(x, 0.25, KEY)
    assert set(np.unique(dropped).round(4)) == {0.0, np.float32(1.3333)}
    assert abs(float(dropped.mean()) - 1) < 0.03


def test_dense_rounds_once_to_the_type_of_the_base():
    base = jnp.ones((4, 4), jnp.bfloat16)
    op = low_rank.LowRank(base, jnp.full((4, 1), 0.25), jnp.full((1, 4), 0.5), scale=2.0)
    assert op.dense().dtype == jnp.bfloat16
    np.testing.assert_array_equal(op.dense().astype(jnp.float32), 1.25)
    assert op(jnp.ones((1, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_nested_loras_merge():
    k = jax.random.normal(KEY, (4, 4))
    inner = low_rank.LowRank(k, jnp.ones((4, 2)), jnp.ones((2, 4)))
    outer = low_rank.LowRank(inner, jnp.ones((4, 1)), jnp.ones((1, 4)), scale=0.5)
    np.testing.assert_allclose(operators.dense(outer), k + 2.5, rtol=1e-5)


def test_gradients_are_those_of_the_merged_kernel():
    k, x = jax.random.normal(KEY, (6, 5)), jax.random.normal(jax.random.key(1), (2, 3, 6))
    train = {"a": jax.random.normal(jax.random.key(2), (6, 2)), "b": jax.random.normal(jax.random.key(3), (2, 5))}
    ours = jax.grad(lambda t: jnp.sum(jnp.sin(low_rank.LowRank(k, **t, scale=0.7)(x))))(train)
    plain = jax.grad(lambda t: jnp.sum(jnp.sin(x @ (k + 0.7 * t["a"] @ t["b"]))))(train)
    for name in train:
        np.testing.assert_allclose(ours[name], plain[name], rtol=1e-4, atol=1e-5)


def test_axes():
    m, p = tiny.model(), tiny.params()
    method = lora.lora("attention/q/kernel")
    axes = method.axes(m.axes, jax.eval_shape(method.init, KEY, p).train)
    assert axes == {Q: {"a": ("layers", "embed", None), "b": ("layers", None, "heads")}}


@pytest.mark.parametrize("bad", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_bad_arguments(bad):
    with pytest.raises(errors.ConfigError, match=next(iter(bad))):
        lora.lora(**bad)
