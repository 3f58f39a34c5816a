"""DoRA against HF PEFT, and its column norms against numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_pair
import pytest

from tunejax.core import low_rank
from tunejax.core import method as methods
from tunejax.methods import dora, registry


@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_logits_and_gradients_equal_peft(family, tmp_path):
    def train(m, read):
        magnitude = m.lora_magnitude_vector["default"].weight
        return {
            "a": read(m.lora_A["default"].weight).T,
            "b": read(m.lora_B["default"].weight).T,
            "m": read(magnitude),
        }

    config = functools.partial(peft_pair.peft.LoraConfig, r=3, lora_alpha=5, use_dora=True)
    peft_pair.check(family, tmp_path, config, {"name": "dora", "r": 3, "lora_alpha": 5.0}, train)


def test_the_formula():
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((5, 7), (5, 2), (2, 7)))
    m, bias, x = (rng.standard_normal(s).astype(np.float32) for s in (7, 7, (3, 5)))
    v = w + 1.5 * a @ b
    op = dora.DoRA(low_rank.LowRank(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b), scale=1.5), jnp.asarray(m))
    expected = x @ (m * v / np.sqrt((v**2).sum(0))) + bias
    np.testing.assert_allclose(op(jnp.asarray(x), jnp.asarray(bias)), expected, atol=1e-5)
    np.testing.assert_allclose(x @ op.dense() + bias, expected, atol=1e-5)
    assert op.shape == (5, 7)


def test_a_bias_that_a_method_before_scales_stays_scaled():
    rng = np.random.default_rng(1)
    w, bias, scales, x = (rng.standard_normal(s).astype(np.float32) for s in ((4, 3), 3, 3, (2, 4)))
    params = {"w": {"kernel": jnp.asarray(w), "bias": jnp.asarray(bias)}}
    ia3 = registry.build({"name": "ia3", "targets": "w/kernel"})
    method = methods.chain(ia3, dora.dora("w/kernel", rank=1))
    scaled = {"w/kernel": {"after": jnp.asarray(scales)}}
    second = method.parts[1].init(jax.random.key(0), ia3.bind(params, scaled, {}, methods.Context()))
    train, state = {"0:ia3": scaled, "1:dora": second.train}, {"0:ia3": {}, "1:dora": {}}
    bound, merged = method.bind(params, train, state, methods.Context())["w"], method.merge(params, train, state)["w"]
    expected = (x @ w + bias) * scales
    np.testing.assert_allclose(bound["kernel"](jnp.asarray(x), bound["bias"]), expected, atol=1e-5)
    np.testing.assert_allclose(x @ merged["kernel"] + merged["bias"], expected, atol=1e-5)


def test_a_column_of_zeros_stays_one():
    """A kernel that was pruned: the start is the identity, and nothing that comes of it is no number."""
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    w[:, 1] = 0
    inner = low_rank.LowRank(jnp.asarray(w), jnp.ones((4, 1)), jnp.zeros((1, 3)))
    op = dora.DoRA(inner, dora.column_norms(w))
    x = jnp.ones((2, 4))
    np.testing.assert_allclose(op(x), x @ w, atol=1e-6)
    np.testing.assert_allclose(op.dense(), w, atol=1e-6)
    grads = jax.grad(lambda b: jnp.sum(dora.DoRA(dataclasses.replace(inner, b=b), op.m)(x)))(inner.b)
    assert np.isfinite(grads).all()
