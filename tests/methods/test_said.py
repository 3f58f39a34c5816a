"""SAID: the Fastfood transform against the product of its matrices, and what an adapter holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from tunejax.core import paths
from tunejax.core.method import Context
from tunejax.methods import said

SEED = jnp.asarray([3, 5], jnp.uint32)


def test_fastfood_is_the_product_of_its_matrices():
    n, size = 32, 21
    signs, order, normal = (np.asarray(x) for x in said.draws(SEED, n))
    assert sorted(order) == list(range(n))
    assert set(np.unique(signs)) == {-1.0, 1.0}
    h = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * 5) / np.sqrt(n)
    whole = h @ np.diag(normal) @ np.eye(n)[order] @ h @ np.diag(signs)
    theta = np.random.default_rng(0).standard_normal(6).astype(np.float32)
    np.testing.assert_allclose(said.fastfood(jnp.asarray(theta), SEED, size), whole[:size, :6] @ theta, atol=1e-5)


def test_entries_have_the_variance_that_is_promised():
    theta = jnp.asarray(np.random.default_rng(0).standard_normal(40), jnp.float32)
    found = jax.vmap(lambda s: said.fastfood(theta, jnp.stack([s, s]), 64))(jnp.arange(200, dtype=jnp.uint32))
    np.testing.assert_allclose(np.mean(found**2), np.sum(theta**2) / 64, rtol=0.1)


def test_one_theta_moves_every_site_each_by_its_own_image():
    params = tiny.params()
    method = said.said("attention/{q,v}/kernel", dim=10)
    start = method.init(jax.random.key(0), params)
    assert start.train["shared"]["theta"].shape == (10,)
    assert {k: v["seed"].shape for k, v in start.state.items()} == {
        f"layers/0/attention/{s}/kernel": (3, 2) for s in "qv"
    }
    train = {**start.train, "shared": {"theta": jnp.arange(10.0)}}
    merged = method.merge(params, train, start.state)
    path = "layers/0/attention/v/kernel"
    change = np.asarray(paths.get(merged, path) - paths.get(params, path))
    seeds = start.state[path]["seed"]
    for i in range(3):
        expected = said.fastfood(jnp.arange(10.0), seeds[i], 16 * 8).reshape(16, 8)
        np.testing.assert_allclose(change[i], expected, atol=1e-5)
    assert np.abs(change[0] - change[1]).max() > 1e-2
    plain = said.said("attention/q/kernel", dim=10, structure=False).init(jax.random.key(0), params).train
    assert jax.tree.map(jnp.shape, plain) == {"layers/0/attention/q/kernel": {}, "shared": {"theta": (10,)}}
    assert method.bind(params, start.train, start.state, Context(train=True, key=jax.random.key(1)))
