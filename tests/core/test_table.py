import jax
import jax.numpy as jnp
import tiny
from tiny import hole, shift

from tunejax.core import method as methods
from tunejax.core import rates, table
from tunejax.methods import registry

PARAMS = 31 * 16 * 2 + 16 + 3 * (2 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)


def test_counts_by_module():
    t = table.table(tiny.params())
    assert t.total == PARAMS == sum(x.size for x in jax.tree.leaves(tiny.params()))
    by_name = {r.module: r.parameters for r in t.rows}
    assert by_name["layers/attention/q"] == 3 * 16 * 16
    assert by_name["embed"] == 31 * 16
    assert t.trained == 0


def test_trained_share():
    p = tiny.params(cuts=(1,))
    method = methods.chain(hole("h", "/norm/scale"), shift("s", "attention/q/kernel"))
    start = method.init(jax.random.key(0), p)
    t = table.table(p, start.train, start.edits)
    assert (t.trained, t.added) == (16 + 3 * 16, 3 * 16)
    assert t.share == 64 / (PARAMS + 48)
    text = t.text()
    assert f"trainable params: 64 || all params: {PARAMS + 48:,}" in text
    assert text.splitlines()[0].split() == ["module", "parameters", "trained"]


def test_what_lies_at_no_path_is_other():
    t = table.table({"a": {"w": jnp.zeros(3)}}, {"extra": jnp.zeros(2)})
    assert [tuple(r) for r in t.rows] == [("a", 3, 0), ("other", 0, 2)]


def test_of_a_masked_difference_what_the_mask_lets_through_counts():
    """Nothing is added to the model, whatever arrays the difference is made of."""
    p = tiny.params()
    size = 3 * 16 * 24 * 2  # mlp/up and mlp/gate
    for spec in ({"name": "fish"}, {"name": "lt_sft", "mask_steps": 1}, {"name": "diff_pruning", "mask_steps": 1}):
        masked = {**spec, "targets": "mlp/{up,gate}/kernel", "density": 0.25}
        made = registry.build([masked, {"name": "full", "targets": "/norm/scale"}])
        start = jax.eval_shape(made.init, jax.random.key(0), p)
        t = table.table(p, rates.learning(made, start.train), start.edits)
        assert (t.trained, t.added) == (size // 4 + 16, 0)
        assert t.share == (size // 4 + 16) / PARAMS
        assert {r.module: r.trained for r in t.rows}["layers/mlp/up"] == size // 8
