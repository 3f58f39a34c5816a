"""MiSS against HF PEFT, with shards that divide a kernel's input and shards that do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_pair
import pytest
import tiny

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.methods import miss


@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_logits_and_gradients_equal_peft(family, rank, tmp_path):
    config = functools.partial(peft_pair.peft.MissConfig, r=rank)
    spec = {"name": "miss", "r": rank}
    peft_pair.check(family, tmp_path, config, spec, lambda m, read: {"b": read(m.miss_block["default"])})


def test_shards_share_their_rows_and_what_is_dropped_is_dropped_before_the_sum():
    rng = np.random.default_rng(0)
    w, b, x = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((7, 4), (3, 4), (2, 7)))
    bound = miss.miss("w/kernel", rank=3, dropout=0.5).bind
    train = {"w/kernel": {"b": b}}
    op = bound({"w": {"kernel": w}}, train, {}, Context())["w"]["kernel"]
    rows = np.asarray(b)[[0, 1, 2, 0, 1, 2, 0]]
    np.testing.assert_allclose(op.dense(), w + rows, rtol=1e-6)
    op = bound({"w": {"kernel": w}}, train, {}, Context(train=True, key=jax.random.key(1)))["w"]["kernel"]
    kept = np.asarray(jax.random.bernoulli(op.key, 0.5, x.shape))
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(op(x), x @ w + np.where(kept, 2 * x, 0) @ rows, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(errors.ConfigError, match="rank is 0"):
        miss.miss(rank=0)
    with pytest.raises(errors.TargetError, match="rank is 64, and a kernel's input has 16 entries"):
        miss.miss("mlp/up/kernel").init(jax.random.key(0), tiny.params())
