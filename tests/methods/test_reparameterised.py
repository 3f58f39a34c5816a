"""The laws of methods, for every one that puts another form beside or around a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import errors, operators, paths, sites
from tunejax.core.method import Context, apply_edits
from tunejax.methods import registry

SPECS = {
    "lora_fa": {"rank": 3, "dropout": 0.2},
    "lora_plus": {"rank": 3, "dropout": 0.2, "ratio": 4.0},
    "dora": {"rank": 3, "dropout": 0.2},
    "pissa": {"rank": 3},
    "olora": {"rank": 3},
    "vera": {"rank": 8, "dropout": 0.2},
    "loha": {"rank": 3},
    "lokr": {"rank": 1},
    "krona": {},
    "oft": {"block_size": 8},
    "boft": {"block_size": 4, "factors": 2},
    "hra": {"rank": 4},
    "fourierft": {"n_frequency": 50, "scaling": 5.0},
    "miss": {"rank": 5, "dropout": 0.2},
    "adalora": {"rank": 4, "target_rank": 2, "total_steps": 3},
    "said": {"dim": 50},
    "loreft": {"rank": 3},
}
NOT_LINEAR = {"loreft"}
KEY = jax.random.key(0)


def method_of(name, **more):
    return registry.build({"name": name, **SPECS[name], **more})


def little(dtype=jnp.float32):
    """Two sites of a stack of three layers."""
    rng = np.random.default_rng(0)
    kernels = {"q": (3, 16, 8), "o": (3, 8, 16)}
    return paths.unflatten(
        {f"layers/0/{k}/kernel": jnp.asarray(0.3 * rng.standard_normal(s), dtype) for k, s in kernels.items()}
    )


def through(params, x):
    """x [..., 16] through both sites of every layer, by a scan, each with a bias."""

    def layer(x, p):
        y = sites.linear(p["q"]["kernel"], x, jnp.ones(8))
        return sites.linear(p["o"]["kernel"], y, None), None

    return jax.lax.scan(layer, x, params["layers"]["0"])[0]


def moved(train):
    """``train``, each entry a little off."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), train)


@pytest.mark.parametrize("name", SPECS)
def test_identity_merge_and_vmap(name):
    params, method = little(), method_of(name, targets="kernel")
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, 16), np.float32))
    start = jax.jit(method.init)(KEY, params)
    base = apply_edits(params, start.edits)
    run = jax.jit(lambda train: through(method.bind(base, train, start.state, Context()), x))
    before = through(params, x)
    np.testing.assert_allclose(run(start.train), before, atol=1e-5)
    train = moved(start.train)
    out = run(train)
    assert np.abs(out - before).max() > 1e-3
    if name in NOT_LINEAR:
        with pytest.raises(errors.NotLinear, match="layers/0/q/kernel"):
            method.merge(base, train, start.state)
    else:
        merged = method.merge(base, train, start.state)
        assert all(operators.is_array(k) for k in paths.flatten(merged).values())
        np.testing.assert_allclose(through(merged, x), out, atol=2e-5)
    two = jax.tree.map(lambda a, b: jnp.stack([a, b]), start.train, train)
    np.testing.assert_allclose(jax.vmap(run)(two)[1], out, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SPECS.keys() - NOT_LINEAR))
def test_types_follow_the_base_and_the_input(name):
    params, method = little(jnp.bfloat16), method_of(name, targets="kernel")
    start = jax.eval_shape(method.init, KEY, params)
    assert {x.dtype for x in jax.tree.leaves(start.train)} == {np.dtype("float32")}
    bound = jax.eval_shape(lambda p, s: method.bind(p, s.train, s.state, Context()), params, start)
    assert jax.eval_shape(through, bound, jnp.ones((2, 16), jnp.bfloat16)).dtype == jnp.bfloat16
    merged = jax.eval_shape(lambda p, s: method.merge(p, s.train, s.state), params, start)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


@pytest.mark.parametrize("name", SPECS)
def test_a_quantised_kernel_may_stand_below(name):
    params = jax.tree.map(lambda k: tiny.Doubled(k / 2), little())
    method = method_of(name, targets="kernel")
    start = method.init(KEY, params)
    x = jnp.ones((2, 16))
    out = through(method.bind(params, start.train, start.state, Context()), x)
    np.testing.assert_allclose(out, through(little(), x), atol=1e-5)
