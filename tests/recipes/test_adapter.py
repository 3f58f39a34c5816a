"""The adapter folder: what was saved comes back, and nothing else is taken for it."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from tunejax.core import errors
from tunejax.recipes import adapter, artefact, export

BASE = adapter.Base("some/model", "a" * 64)


def tree():
    key = jax.random.key(0)
    return {"0:x": {"layers/0/q/kernel": {"a": jax.random.normal(key, (2, 3)), "b": jnp.zeros((3,))}, "none": None}}


def state():
    return {"mask": jnp.ones((2,), bool), "updates": jnp.full((), 3, jnp.int32)}


@pytest.fixture
def saved(tmp_path):
    adapter.save(tmp_path, {"train": tree(), "state": state()}, BASE, {"method": "x", "step": 3})
    return tmp_path


def test_arrays_and_spec_come_back(saved):
    found = adapter.read(saved)
    assert found.base == BASE
    assert found.info["step"] == 3
    back = adapter.restore(found, "train", jax.eval_shape(tree))
    jax.tree.map(np.testing.assert_array_equal, back, tree())
    jax.tree.map(np.testing.assert_array_equal, adapter.restore(found, "state", jax.eval_shape(state)), state())


def test_what_a_run_trained_is_read_as_the_methods_train(saved):
    saved.rename(saved.parent / "adapter")
    found, method = adapter.trained(str(saved.parent))
    assert method == "x"
    jax.tree.map(np.testing.assert_array_equal, found, {"0:x": {k: v for k, v in tree()["0:x"].items() if k != "none"}})


def test_the_file_is_plain_safetensors(saved):
    names = safetensors.load_file(saved / adapter.ARRAYS)
    assert set(names) == {
        "train|0:x|layers/0/q/kernel|a",
        "train|0:x|layers/0/q/kernel|b",
        "state|mask",
        "state|updates",
    }


def test_another_base_is_refused_with_both_names(saved):
    found = adapter.read(saved)
    adapter.check_base(found, adapter.Base("the same elsewhere", "a" * 64))
    with pytest.raises(errors.CheckpointError, match=r"some/model \(digest aaaa.*is other/model \(digest bbbb"):
        adapter.check_base(found, adapter.Base("other/model", "b" * 64))


def test_arrays_that_do_not_fit_are_all_named(saved):
    found = adapter.read(saved)
    like = {"0:x": {"layers/0/q/kernel": {"a": jnp.zeros((2, 4)), "c": jnp.zeros((1,))}}}
    with pytest.raises(errors.CheckpointError) as caught:
        adapter.restore(found, "train", like)
    for part in ("|c is missing", "|b is not of this method", "|a has shape (2, 3), expected (2, 4)"):
        assert part in str(caught.value)


def test_damage_is_told(saved, tmp_path):
    with pytest.raises(errors.CheckpointError, match=r"has no adapter\.json"):
        adapter.read(tmp_path / "nowhere")
    arrays = (saved / adapter.ARRAYS).read_bytes()
    (saved / adapter.ARRAYS).write_bytes(arrays[:20])
    with pytest.raises(errors.CheckpointError, match="is damaged"):
        adapter.read(saved)
    (saved / adapter.ARRAYS).write_bytes(arrays)
    (saved / adapter.SPEC).write_text(json.dumps({"format": 99, "base": BASE._asdict()}))
    with pytest.raises(errors.CheckpointError, match="format 99"):
        adapter.read(saved)
    (saved / adapter.SPEC).write_text("{")
    with pytest.raises(errors.CheckpointError, match="is damaged"):
        adapter.read(saved)


def test_an_adapter_of_peft_without_a_base_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(errors.CheckpointError, match="base_model_name_or_path"):
        artefact.open_run(str(tmp_path))


@pytest.mark.parametrize("library", ["peft", "adapterhub"])
def test_what_an_adapter_alone_cannot_carry_is_told(library, tmp_path):
    """A pooler that neither the base nor the folder has."""
    model = SimpleNamespace(layers=None, random_init=False, head="classification")
    config, method = SimpleNamespace(model=model), SimpleNamespace(parts=())
    parts = SimpleNamespace(config=config, method=method, prompt=(), front=())
    fresh = ["classifier/kernel", "pooler/kernel"]
    tuned = SimpleNamespace(parts=parts, loaded=SimpleNamespace(fresh=fresh), train={"layers/0/mlp/down/kernel": {}})
    with pytest.raises(errors.ConfigError, match="no pooler/kernel"):
        export._alone(tmp_path / "out", tuned, SimpleNamespace(format=library, dtype=None))
    assert not list(tmp_path.iterdir())
