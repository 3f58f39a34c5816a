"""One check for every method: a few steps on a tiny scanned decoder, recomputed in the backward pass."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from tunejax.core.method import Method
from tunejax.methods import registry
from tunejax.models import build
from tunejax.objectives import causal_lm
from tunejax.train import optimizer, sharding, state, step


def rows(length=8):
    """One batch of four full rows to learn by heart."""
    tokens = np.random.default_rng(3).integers(1, 31, (4, length + 1)).astype(np.int32)
    ones = np.ones((4, length), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": ones.astype(np.float32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape),
        "segment_ids": ones,
    }


def begin(method, learning_rate=1e-2, remat="full", shape=(1, 1, 1), batch=None):
    """(step, state, base, batch) of a run by AdamW without decay.

    method: or its description; shape: of the mesh; batch: `rows` unless given.
    """
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    method = method if isinstance(method, Method) else registry.build(method)
    cuts = method.cuts(tiny.LLAMA.num_layers)
    model = build.build(tiny.LLAMA, head="lm", cuts=cuts, remat=remat, constrain=sharding.constrainer(mesh))
    params = jax.tree.map(jnp.array, tiny.params(cuts=cuts))
    tuner = optimizer.make_optimizer("adamw", learning_rate)
    s, base = state.start(model, method, tuner, params, jax.random.key(0), mesh)
    one = step.make_step(model, method, causal_lm.make(), tuner, mesh=mesh)
    return one, s, base, one.put(rows() if batch is None else batch)


def run(method, steps=3, **kw):
    """Losses of a few steps, and the last state; asserts that no bit of the base moved."""
    one, s, base, batch = begin(method, **kw)
    before = jax.tree.map(np.array, base)
    losses = []
    for _ in range(steps):
        s, metrics = one(s, base, {}, batch)
        losses.append(float(metrics["loss"]))
    assert jax.tree.structure(base) == jax.tree.structure(before)
    for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(before), strict=True):
        assert np.asarray(a).tobytes() == b.tobytes()
    return losses, s


def falls(method, **kw):
    """Asserts that each loss is below the one before it."""
    losses, s = run(method, **kw)
    assert all(b < a for a, b in itertools.pairwise(losses)), losses
    return s
