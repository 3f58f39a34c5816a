"""LoRA-FA and LoRA+: what trains, and how fast."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_pair
import pytest
import tiny

from tunejax.core import errors
from tunejax.core import method as methods
from tunejax.methods import bitfit, lora
from tunejax.objectives import causal_lm
from tunejax.train import optimizer, sharding, state, step

Q = "layers/0/attention/q/kernel"


@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_lora_fa_equals_peft_with_a_frozen(family, tmp_path):
    config = functools.partial(peft_pair.peft.LoraConfig, r=3, lora_alpha=5)
    peft_pair.check(
        family,
        tmp_path,
        config,
        {"name": "lora_fa", "r": 3, "lora_alpha": 5.0},
        lambda m, read: {"b": read(m.lora_B["default"].weight).T},
        lambda m, read: {"a": read(m.lora_A["default"].weight).T},
    )


def first_change(method, name, **kw):
    """What one step adds to each array of the queries' site, B being off its start so that A has a gradient too."""
    model, mesh = tiny.model(), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    tuner = optimizer.make_optimizer(name, 1e-2, weight_decay=0.1, **kw)
    params = jax.tree.map(jnp.array, tiny.params())
    s, base = state.start(model, method, tuner, params, jax.random.key(0), mesh)
    s = s._replace(train=jax.tree.map(lambda x: x + 0.05, s.train))
    before = jax.tree.map(np.asarray, s.train)
    one = step.make_step(model, method, causal_lm.make(), tuner, mesh=mesh)
    after, _ = one(s, base, {}, one.put(tiny.lm_batch()))
    return jax.tree.map(lambda new, old: np.asarray(new) - old, after.train, before)


@pytest.mark.parametrize(("name", "kw"), [("sgd", {"momentum": 0.0}), ("adamw", {})])
def test_lora_plus_moves_b_ratio_times_as_far(name, kw):
    plain = first_change(lora.lora(rank=2), name, **kw)[Q]
    plus = first_change(lora.lora_plus(rank=2, ratio=16.0), name, **kw)[Q]
    assert min(np.abs(x).max() for x in plain.values()) > 1e-6
    np.testing.assert_allclose(plus["a"], plain["a"], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(plus["b"], 16 * plain["b"], rtol=2e-4, atol=2e-6)


def test_rates_of_a_chain():
    method = methods.chain(lora.lora_plus("attention/q/kernel", ratio=4.0), bitfit.bitfit("mlp/up/bias"))
    train = method.init(jax.random.key(0), tiny.params()).train
    rates = method.rates(train)
    assert rates == {"0:lora_plus": {Q: {"a": 1.0, "b": 4.0}}, "1:bitfit": {"layers/0/mlp/up/bias": 1.0}}


def test_a_ratio_is_positive():
    with pytest.raises(errors.ConfigError, match="ratio is 0"):
        lora.lora_plus(ratio=0)
