"""Presets are chains: what each makes equals its parts, written out."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from tunejax.core import errors, paths
from tunejax.core.method import Context, apply_edits
from tunejax.methods import registry
from tunejax.models import build

KEY = jax.random.key(0)
MAM = {"name": "mam", "length": 3, "hidden": 5, "width": 4}
S4 = {"name": "s4", "budget": 4}


def test_mam_is_a_prefix_and_a_parallel_adapter():
    method = registry.build(MAM)
    assert [m.name for m in method.parts] == ["prefix_tuning", "parallel_adapter"]
    assert method.prefix == 3
    parts = registry.build([
        {"name": "prefix_tuning", "length": 3, "project": True, "hidden": 5},
        {"name": "parallel_adapter", "width": 4, "scale": 4.0},
    ])  # fmt: skip
    p = tiny.params()
    ours, theirs = (m.init(KEY, p) for m in (method, parts))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    noise = jax.tree.map(lambda x: x + 0.1, ours.train)
    m = tiny.model()
    np.testing.assert_array_equal(*(tiny.outputs(m, x.bind(p, noise, ours.state, Context())) for x in (method, parts)))


def test_a_preset_in_a_list_is_part_of_the_chain():
    method = registry.build([MAM, {"name": "bitfit"}])
    assert [m.name for m in method.parts] == ["prefix_tuning", "parallel_adapter", "bitfit"]


def deep(config=tiny.LLAMA, depth=4, head="lm"):
    """(method, model, parameters) of S4 on a deeper stack."""
    method = registry.build(S4)
    model = build.build(dataclasses.replace(config, num_layers=depth), head=head, cuts=method.cuts(depth))
    return method, model, model.init(jax.random.key(1))


@pytest.mark.parametrize(
    ("depth", "sizes"), [(12, [2, 4, 4, 2]), (6, [1, 2, 2, 1]), (4, [1, 1, 1, 1]), (32, [5, 11, 11, 5])]
)
def test_s4_is_a_spindle(depth, sizes):
    assert np.diff([0, *registry.build(S4).cuts(depth), depth]).tolist() == sizes


def test_s4_trains_what_the_paper_found_in_each_group_with_one_budget():
    config = dataclasses.replace(tiny.LLAMA, num_kv_heads=4)
    method, _, p = deep(config)
    start = jax.eval_shape(method.init, KEY, p)
    found, sizes = {}, {}
    for key, train in start.train.items():
        for path, arrays in train.items():
            group = path.split("/")[1]
            found.setdefault(group, set()).add(key.partition(":")[2])
            if not key.endswith("bitfit"):
                entries = sum(x.size // x.shape[0] for n, x in arrays.items() if "bias" not in n)
                sizes[group] = sizes.get(group, 0) + entries
    assert found == {
        "0": {"pfeiffer", "lora"},
        "1": {"pfeiffer", "prefix_tuning"},
        "2": {"pfeiffer", "prefix_tuning", "bitfit"},
        "3": {"prefix_tuning", "bitfit", "lora"},
    }
    assert set(sizes.values()) == {2 * 2 * 4 * config.embed_dim}


def test_s4_is_the_identity_but_for_its_prefix():
    method, model, p = deep(tiny.BERT, head="mlm")
    start = method.init(KEY, p)
    base = apply_edits(p, start.edits)
    bound = method.bind(base, start.train, start.state, Context())
    empty = {path: None for path, x in paths.flatten(p).items() if path.endswith("attention/prefix") and x is None}
    np.testing.assert_allclose(tiny.outputs(model, p), tiny.outputs(model, paths.replace(bound, empty)), atol=1e-6)


def test_s4_refuses_a_stack_without_four_groups():
    with pytest.raises(errors.ConfigError, match="selects no layer of a stack of 3"):
        registry.build(S4).cuts(3)
    with pytest.raises(errors.ConfigError, match="at least 2"):
        registry.build({**S4, "budget": 1})
