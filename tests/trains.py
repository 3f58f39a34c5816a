"""A few steps of any method on a tiny scanned model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from tunejax.core.method import Method
from tunejax.methods import registry
from tunejax.models import build
from tunejax.objectives import causal_lm, masked_lm
from tunejax.train import optimizer, sharding, state, step


def rows(count=4, length=8, prompt=0, vocab=31):
    """One batch of full rows to learn by heart, each after ``prompt`` virtual tokens that bear no loss."""
    first = np.broadcast_to(np.arange(vocab, vocab + prompt), (count, prompt))
    tokens = np.random.default_rng(3).integers(1, vocab, (count, length + 1))
    tokens = np.concatenate([first, tokens], axis=1).astype(np.int32)
    weights = np.broadcast_to(np.arange(prompt + length) >= prompt, (count, prompt + length)).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": np.where(weights > 0, tokens[:, 1:], 0),
        "loss_weights": weights,
        "positions": np.broadcast_to(np.arange(prompt + length, dtype=np.int32), weights.shape),
        "segment_ids": np.ones(weights.shape, np.int32),
    }


def begin(method, learning_rate=1e-2, remat="full", shape=(1, 1, 1), batch=None, config=tiny.LLAMA):
    """(step, state, base, batch) of a run by AdamW without decay, towards the targets at their own positions.

    method: or its description; shape: of the mesh; batch: `rows` unless given.
    """
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    facts = {"num_kv_heads": config.num_kv_heads}
    method = method if isinstance(method, Method) else registry.build(method, facts=facts)
    cuts, head = method.cuts(config.num_layers), "mlm" if config.kind == "encoder" else "lm"
    model = build.build(config, head=head, cuts=cuts, remat=remat, constrain=sharding.constrainer(mesh))
    params = jax.tree.map(jnp.array, tiny.params(config, head, cuts))
    tuner = optimizer.make_optimizer("adamw", learning_rate)
    s, base = state.start(model, method, tuner, params, jax.random.key(0), mesh)
    objective = masked_lm.make() if config.kind == "encoder" else causal_lm.make()
    one = step.make_step(model, method, objective, tuner, mesh=mesh)
    return one, s, base, one.put(rows(prompt=method.prompt) if batch is None else batch)


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
