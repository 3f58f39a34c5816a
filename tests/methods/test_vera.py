"""VeRA against HF PEFT."""

import functools

import jax
import numpy as np
import peft_pair
import pytest
import tiny

from tunejax.methods import vera


@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_logits_and_gradients_equal_peft(family, tmp_path):
    config = functools.partial(peft_pair.peft.VeraConfig, r=5, d_initial=0.3)
    peft_pair.check(
        family,
        tmp_path,
        config,
        {"name": "vera", "r": 5},
        lambda m, read: {
            "scale_d": read(m.vera_lambda_d["default"]),
            "scale_b": read(m.vera_lambda_b["default"]),
        },
        shared=lambda m: {"a": m.vera_A["default"].numpy().T, "b": m.vera_B["default"].numpy().T},
    )


def test_what_is_shared_and_drawn():
    start = vera.vera(rank=6, d_initial=0.2).init(jax.random.key(0), tiny.params())
    assert set(start.state) == {"shared"}
    shared = start.state["shared"]
    assert (shared["a"].shape, shared["b"].shape) == ((24, 6), (6, 24))
    np.testing.assert_allclose(np.std(shared["a"]), np.sqrt(2 / 24), rtol=0.2)
    site = start.train["layers/0/attention/k/kernel"]
    np.testing.assert_array_equal(site["scale_d"], np.full((3, 6), 0.2, np.float32))
    np.testing.assert_array_equal(site["scale_b"], np.zeros((3, 8), np.float32))
    again = vera.vera("mlp/up/kernel", rank=6).init(jax.random.key(5), tiny.params()).state["shared"]
    np.testing.assert_array_equal(again["b"], shared["b"])
    other = vera.vera(rank=6, seed=1).init(jax.random.key(0), tiny.params()).state["shared"]
    assert not np.array_equal(other["b"], shared["b"])
