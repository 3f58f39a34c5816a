"""Merged parameters go back to their base, and what is no merge of it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import errors, paths, unmerge
from tunejax.core.method import apply_edits
from tunejax.methods import registry

LINEAR = {"name": "lora", "rank": 3, "targets": ["attention/{q,v}/kernel", "mlp/down/kernel"]}
SPECS = {
    "lora": LINEAR,
    "some layers": {**LINEAR, "layers": "1:"},
    "dora": {**LINEAR, "name": "dora"},
    "ia3": {"name": "ia3"},
    "full": {"name": "full", "targets": ["mlp/down/kernel", "mlp/norm/scale"]},
    "added biases": {"name": "bitfit"},
    "quantized": [{"name": "quantize", "kind": "int8"}, LINEAR],
}


def merged(spec, config, head, dtype=jnp.float32):
    """(what was merged, base, method, train, state, edits), with noise in what trains."""
    method = registry.build(spec)
    p = jax.tree.map(lambda x: x.astype(dtype), tiny.params(config, head, method.cuts(config.num_layers)))
    start = method.init(jax.random.key(0), p)
    rng = np.random.default_rng(2)
    train = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), start.train)
    return method.merge(apply_edits(p, start.edits), train, start.state), p, method, train, start.state, start.edits


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("config", "head"), [(tiny.LLAMA, "lm"), (tiny.BERT, "mlm")])
def test_back_to_the_base(name, config, head):
    found, base, *others = merged(SPECS[name], config, head)
    if jax.tree.structure(found) == jax.tree.structure(base):
        changed = unmerge.farthest(found, base)
        assert changed.largest > 1e-2
        assert not changed.within(1e-7)
    back = unmerge.unmerge(found, base, *others)
    assert jax.tree.structure(back) == jax.tree.structure(base)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=0), back, base)
    assert unmerge.farthest(back, base).within(jnp.finfo(jnp.float32).eps)


def test_a_base_in_few_bits_comes_back_in_them():
    found, base, *others = merged(LINEAR, tiny.LLAMA, "lm", jnp.bfloat16)
    back = unmerge.unmerge(found, base, *others)
    assert {x.dtype for x in jax.tree.leaves(back)} == {jnp.dtype(jnp.bfloat16)}
    assert unmerge.farthest(back, base).within(jnp.finfo(jnp.bfloat16).eps)


def test_what_else_happened_stays():
    found, base, *others = merged(LINEAR, tiny.LLAMA, "lm")
    further = jax.tree.map(lambda x: x + 0.5, found)
    back = unmerge.unmerge(further, base, *others)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y + 0.5, atol=1e-6), back, base)
    gap = unmerge.farthest(back, base)
    assert gap.largest == pytest.approx(0.5, abs=1e-5)
    assert not gap.within(1e-3)


Q = "layers/0/attention/q/kernel"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({Q: jnp.zeros((3, 16, 15))}, rf"{Q}: of shape \(3, 16, 15\), expected \(3, 16, 16\)"),
        ({"layers/0/attention/q/bias": jnp.zeros((3, 16))}, "q/bias: of shape .* neither the base nor the method"),
        ({Q: None, "embed/table": None}, rf"embed/table: missing.*\n  {Q}: missing"),
        ({Q: tiny.Doubled(jnp.zeros((3, 16, 16)))}, f"{Q}: Doubled stands there"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    found, base, *others = merged(LINEAR, tiny.LLAMA, "lm")
    with pytest.raises(errors.ConfigError, match=said):
        unmerge.unmerge(paths.replace(found, change), base, *others)


def test_what_does_not_merge_is_not_unmerged():
    method = registry.build({"name": "pfeiffer", "width": 2})
    p = tiny.params()
    start = method.init(jax.random.key(0), p)
    with pytest.raises(errors.NotLinear):
        unmerge.unmerge(p, p, method, start.train, start.state)
