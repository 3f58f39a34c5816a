"""Householder reflections against HF PEFT, and against matrices of the paper's formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_pair
import pytest
import tiny

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.methods import hra


@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_logits_and_gradients_equal_peft(family, tmp_path):
    config = functools.partial(peft_pair.peft.HRAConfig, r=4)
    peft_pair.check(family, tmp_path, config, {"name": "hra", "r": 4}, lambda m, read: {"u": read(m.hra_u["default"])})


def test_mirrors_equal_the_papers_matrices():
    rng = np.random.default_rng(0)
    w, u, x, bias = (rng.standard_normal(n).astype(np.float32) for n in ((16, 7), (16, 4), (2, 3, 16), 7))
    whole = np.eye(16, dtype=np.float32)
    for column in u.T:
        whole = (np.eye(16) - 2 * np.outer(column, column) / (column @ column)) @ whole
    np.testing.assert_allclose(whole @ whole.T, np.eye(16), atol=1e-5)
    assert np.linalg.matrix_rank(whole - np.eye(16), tol=1e-4) == 4
    train = {"w/kernel": {"u": jnp.asarray(u)}}
    op = hra.hra("w/kernel", rank=4).bind({"w": {"kernel": jnp.asarray(w)}}, train, {}, Context())["w"]["kernel"]
    np.testing.assert_allclose(op(jnp.asarray(x), jnp.asarray(bias)), x @ whole @ w + bias, atol=2e-5)
    np.testing.assert_allclose(op.dense(), whole @ w, atol=1e-5)


def test_reflections_start_as_pairs_of_the_length_that_peft_draws():
    u = hra.hra("mlp/up/kernel", rank=8).init(jax.random.key(0), tiny.params()).train["layers/0/mlp/up/kernel"]["u"]
    np.testing.assert_array_equal(u[..., ::2], u[..., 1::2])
    half = peft_pair.torch.nn.Linear(4, 16, bias=False).weight  # drawn as PEFT draws a half of them: of fan-in 4
    assert np.abs(u).max() <= 0.5
    np.testing.assert_allclose(np.std(u), half.detach().numpy().std(), rtol=0.3)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_reflections_without_a_pair_are_refused(rank):
    with pytest.raises(errors.ConfigError, match="2, 4, 6"):
        hra.hra(rank=rank)


def test_reflections_that_start_alone_may_be_odd():
    u = hra.hra("mlp/up/kernel", rank=3, pairs=False).init(jax.random.key(0), tiny.params()).train
    u = u["layers/0/mlp/up/kernel"]["u"]
    assert u.shape[-1] == 3
    assert not np.allclose(u[..., 0], u[..., 1])
    with pytest.raises(errors.ConfigError, match="at least 1"):
        hra.hra(rank=0, pairs=False)
