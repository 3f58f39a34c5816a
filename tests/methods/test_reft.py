"""LoReFT against the paper's formula in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.methods import reft


def test_the_formula():
    rng = np.random.default_rng(0)
    w, x, bias = (rng.standard_normal(s).astype(np.float32) for s in ((5, 8), (2, 3, 5), 8))
    raw, m, c = (rng.standard_normal(s).astype(np.float32) for s in ((8, 3), (8, 3), 3))
    method = reft.loreft("w/kernel", rank=3)
    train = {"w/kernel": {"r": jnp.asarray(raw), "m": jnp.asarray(m), "c": jnp.asarray(c)}}
    op = method.bind({"w": {"kernel": jnp.asarray(w)}}, train, {}, Context())["w"]["kernel"]
    q, upper = np.linalg.qr(raw)
    r = (q * np.sign(np.diag(upper))).T
    np.testing.assert_allclose(r @ r.T, np.eye(3), atol=1e-5)
    h = x @ w + bias
    expected = h + (h @ m + c - h @ r.T) @ r
    np.testing.assert_allclose(op(jnp.asarray(x), jnp.asarray(bias)), expected, atol=1e-4)


def test_only_the_subspace_changes():
    params = tiny.params()
    method = reft.loreft(rank=2)
    start = method.init(jax.random.key(0), params)
    at = "layers/0/mlp/down/kernel"
    train = {at: {**start.train[at], "m": start.train[at]["m"] + 1.0}}
    op = method.bind(params, train, {}, Context())["layers"]["0"]["mlp"]["down"]["kernel"]
    one = jax.tree.map(lambda a: a[0], op)
    change = one(jnp.ones((1, 24))) - jnp.ones((1, 24)) @ one.base
    outside = change - change @ one.r @ one.r.T
    assert np.abs(change).max() > 1e-2
    np.testing.assert_allclose(outside, 0, atol=1e-5)


def test_a_rank_beyond_the_output_is_refused():
    with pytest.raises(errors.TargetError, match="rank is 17, and a site gives 16"):
        reft.loreft(rank=17).init(jax.random.key(0), tiny.params())
