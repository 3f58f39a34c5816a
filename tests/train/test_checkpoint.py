"""Checkpoints: the same bytes back, on any mesh, or an error that says what is wrong."""

import jax
import numpy as np
import optax
import pytest
import toy

from tunejax.core import errors
from tunejax.objectives import causal_lm
from tunejax.train import checkpoint, sharding, state, step


def begin(mesh, method):
    model = toy.model()
    return state.start(model, method, optax.adam(1e-2), model.init(jax.random.key(0)), jax.random.key(1), mesh)


def bytes_of(s):
    return jax.tree.map(lambda x: np.array(x), s._replace(key=jax.random.key_data(s.key)))


def test_saved_while_training_goes_on_and_restored_on_another_mesh(tmp_path):
    mesh, other = sharding.make_mesh(2, 2, 2), sharding.make_mesh(devices=jax.devices()[:1])
    s, base = begin(mesh, toy.full())
    one = step.make_step(toy.model(), toy.full(), causal_lm.make(), optax.adam(1e-2), mesh=mesh)
    keeper = checkpoint.Checkpointer(tmp_path)
    s, _ = one(s, base, {}, one.put(toy.batch(0)))
    want = bytes_of(s)
    keeper.save(s, b"\x00any bytes", {"best": None})
    for i in range(1, 6):
        s, _ = one(s, base, {}, one.put(toy.batch(i)))
    keeper.wait()
    found = keeper.restore(begin(other, toy.full())[0])
    assert found.data == b"\x00any bytes"
    assert found.loop == {"best": None}
    jax.tree.map(np.testing.assert_array_equal, bytes_of(found.state), want)
    assert found.state.key.dtype == s.key.dtype
    assert jax.tree.leaves(found.state.train)[0].sharding.mesh == other
    keeper.close()


def test_another_method_is_refused_by_name(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    keeper = checkpoint.Checkpointer(tmp_path)
    keeper.save(begin(mesh, toy.full())[0]._replace(step=np.int32(1)), {}, {})
    keeper.wait()
    with pytest.raises(errors.CheckpointError, match="another model or method"):
        keeper.restore(begin(mesh, toy.low_rank())[0])
    with pytest.raises(errors.CheckpointError, match="no checkpoint"):
        checkpoint.Checkpointer(tmp_path / "none").restore(begin(mesh, toy.full())[0])
    keeper.close()


def test_a_damaged_checkpoint_is_named(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    keeper = checkpoint.Checkpointer(tmp_path)
    s = begin(mesh, toy.full())[0]
    for n in (1, 2):
        keeper.save(s._replace(step=np.int32(n)), {}, {})
    keeper.close()
    for part in (tmp_path / "2" / "state").rglob("*"):
        if part.is_file():
            part.write_bytes(b"")
    with pytest.raises(errors.CheckpointError, match=r"(?s)cannot be read.*resume from step 1"):
        checkpoint.Checkpointer(tmp_path).restore(s)
