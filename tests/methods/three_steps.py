"""A few training steps on a tiny model, with virtual tokens or a prefix, on one device and on eight."""

import jax
import numpy as np
import optax
import tiny

from tunejax.models import build
from tunejax.objectives import causal_lm
from tunejax.train import sharding, state, step


def batch(prompt, rows=8, length=6):
    """Next-token rows, each after ``prompt`` virtual tokens without loss."""
    first = np.broadcast_to(np.arange(31, 31 + prompt), (rows, prompt))
    tokens = np.concatenate([first, np.random.default_rng(0).integers(0, 31, (rows, length + 1))], 1).astype(np.int32)
    weights = np.broadcast_to(np.arange(prompt + length) >= prompt, (rows, prompt + length)).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": np.where(weights > 0, tokens[:, 1:], 0),
        "loss_weights": weights,
        "positions": np.broadcast_to(np.arange(prompt + length, dtype=np.int32), weights.shape),
        "segment_ids": np.ones(weights.shape, np.int32),
    }


def losses(method, shape, steps=4, rate=3e-2):
    """The loss before each step; asserts that the base comes out bit-identical."""
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    constrain = sharding.constrainer(mesh)
    model = build.build(tiny.LLAMA, head="lm", remat="full", cuts=method.cuts(3), constrain=constrain)
    tuner = optax.adam(rate)
    params = tiny.params(cuts=method.cuts(3))
    s, base = state.start(model, method, tuner, params, jax.random.key(0), mesh)
    one = step.make_step(model, method, causal_lm.make(), tuner, mesh=mesh)
    before = jax.device_get(base)
    out = []
    for _ in range(steps):
        s, metrics = one(s, base, {}, one.put(batch(method.prompt)))
        out.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), before)
    assert jax.tree.structure(base) == jax.tree.structure(params)
    return out


def check(method):
    """The loss falls at each of three steps, in the same way on one device and on eight."""
    one = losses(method, (1, 1, 1))
    assert one == sorted(one, reverse=True)
    assert one[-1] < one[0] - 1e-3
    np.testing.assert_allclose(losses(method, (2, 2, 2)), one, atol=1e-5)
