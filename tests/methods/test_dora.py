"""DoRA against HF PEFT, and its column norms against numpy."""

import functools

import jax.numpy as jnp
import numpy as np
import peft_pair
import pytest

from tunejax.core import low_rank
from tunejax.methods import dora


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
