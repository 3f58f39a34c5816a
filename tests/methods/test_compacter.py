"""Compacter against sums of np.kron."""

import branches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from branches import DOWN, OUT, noisy

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.methods import compacter

KEY = jax.random.key(0)


def kernel(a, s, t):
    return sum(np.kron(a[i], s[i] @ t[i]) for i in range(len(a)))


def test_a_sum_of_kronecker_products():
    rng = np.random.default_rng(0)
    a, s, t = rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 2, 5))
    op = compacter.Kronecker(*(jnp.asarray(x, jnp.float32) for x in (a, s, t)))
    x, bias = rng.normal(size=(2, 6, 12)), rng.normal(size=15)
    assert op.shape == (12, 15)
    np.testing.assert_allclose(op.dense(), kernel(a, s, t), rtol=1e-5, atol=1e-5)
    found = op(jnp.asarray(x, jnp.float32), jnp.asarray(bias, jnp.float32))
    np.testing.assert_allclose(found, x @ kernel(a, s, t) + bias, rtol=1e-4, atol=1e-4)


def test_dense_of_a_stack():
    rng = np.random.default_rng(1)
    a, s, t = rng.normal(size=(4, 2, 2, 2)), rng.normal(size=(4, 2, 3, 1)), rng.normal(size=(4, 2, 1, 2))
    op = compacter.Kronecker(*(jnp.asarray(x, jnp.float32) for x in (a, s, t)))
    assert op.shape == (4, 6, 4)
    for i in range(4):
        np.testing.assert_allclose(op.dense()[i], kernel(a[i], s[i], t[i]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_adapter_in_the_model(rank):
    m, p = tiny.model(), tiny.params()
    method = compacter.compacter(width=8, phm_dim=4, rank=rank, activation="tanh", scale=0.5)
    train = noisy(method.init(KEY, p).train)
    plain, both = branches.of(m, p), branches.of(m, method.bind(p, train, {}, Context()))
    a, site = np.asarray(train["shared"]["a"]), {k: np.asarray(x)[0] for k, x in train[OUT].items()}
    down, up = (kernel(a, site[f"{w}_s"], site[f"{w}_t"]) for w in ("down", "up"))
    assert (down.shape, up.shape) == ((16, 8), (8, 16))
    h = plain["attention"][0]
    expected = h + 0.5 * (np.tanh(h @ down + site["down_bias"]) @ up + site["up_bias"])
    np.testing.assert_allclose(both["attention"][0], expected, rtol=1e-5, atol=1e-5)


def test_start():
    m, p = tiny.model(), tiny.params()
    method = compacter.compacter(reduction_factor=4, phm_dim=2)
    start = method.init(KEY, p)
    assert set(start.train) == {DOWN, OUT, "shared"}
    assert start.train["shared"]["a"].shape == (2, 2, 2)
    assert {k: x.shape for k, x in start.train[DOWN].items()} == {
        "down_s": (3, 2, 8, 1),
        "down_t": (3, 2, 1, 2),
        "down_bias": (3, 4),
        "up_s": (3, 2, 2, 1),
        "up_t": (3, 2, 1, 8),
        "up_bias": (3, 16),
    }
    bound = method.bind(p, start.train, {}, Context())
    np.testing.assert_array_equal(tiny.outputs(m, p), tiny.outputs(m, bound))
    with pytest.raises(errors.NotLinear, match=DOWN):
        method.merge(p, start.train, {})
    axes = method.axes(m.axes, start.train)
    assert axes["shared"]["a"] == (None, None, None)
    assert axes[DOWN]["up_t"] == ("layers", None, None, None)
    assert axes[DOWN]["up_bias"] == ("layers", "embed")


def test_fresh_kernels_have_the_variance_of_one_over_in():
    params = {"w": {"kernel": jnp.ones((7, 512))}}
    train = compacter.compacter("w/kernel", width=256, phm_dim=8, rank=4).init(KEY, params).train
    site = train["w/kernel"]
    op = compacter.Kronecker(train["shared"]["a"], site["down_s"], site["down_t"])
    assert abs(np.std(op.dense()) * np.sqrt(512) - 1) < 0.15


@pytest.mark.parametrize("bad", [{"phm_dim": 3, "width": 8}, {"rank": 0}, {"phm_dim": 0}])
def test_bad_arguments(bad):
    with pytest.raises(errors.ConfigError, match="phm_dim"):
        compacter.compacter(**bad)
    with pytest.raises(errors.ConfigError, match="does not divide the 16"):
        compacter.compacter(phm_dim=3).init(KEY, tiny.params())
