"""The laws that hold for every method, one after another: identity, partition, shapes alone, vmap, types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.methods import registry, report

KEY = jax.random.key(0)
SPECS = {
    "ia3": {},
    "houlsby": {"width": 4},
    "pfeiffer": {"width": 4, "drop_random": 1},
    "parallel_adapter": {"width": 4},
    "compacter": {"width": 4, "phm_dim": 2},
    "norm_tuning": {},
    "fish": {"density": 0.1},
    "lt_sft": {"mask_steps": 1},
    "diff_pruning": {"mask_steps": 1},
    "gated": {"method": {"name": "pfeiffer", "width": 4}, "reads": "output"},
    "lst": {"reduction_factor": 2},
    "at the join": {"name": "pfeiffer", "width": 4, "reads": "sum"},
}


@pytest.fixture(params=sorted(SPECS))
def method(request):
    return registry.build({"name": request.param, **SPECS[request.param]})


@pytest.mark.parametrize(("config", "head"), [(tiny.LLAMA, "lm"), (tiny.BERT, "mlm")])
def test_identity_and_partition(method, config, head):
    m, p = tiny.model(config, head), tiny.params(config, head)
    start = method.init(KEY, p)
    base = methods.apply_edits(p, start.edits)
    bound = method.bind(base, start.train, start.state, Context())
    np.testing.assert_allclose(tiny.outputs(m, p), tiny.outputs(m, bound), atol=1e-6)
    places = [jax.tree.leaves(x) for x in (base, start.train, start.state)]
    kept, train, state = ({id(x) for x in leaves} for leaves in places)
    # A leaf that moved into train may be the array itself: a hole stands where it was.
    assert not kept & train
    assert not (kept | train) & state
    assert sum(map(len, places)) == len(kept | train | state)


def test_init_of_shapes_alone(method):
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params())
    shapes = jax.eval_shape(method.init, KEY, p)
    real = method.init(KEY, p)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
    assert {x.dtype for x in jax.tree.leaves(real.train)} == {jnp.dtype("float32")}
    axes = method.axes(tiny.model().axes, shapes.train)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, names: len(names) == len(x.shape), shapes.train, axes)))


def test_vmap_over_train(method):
    m, p = tiny.model(), tiny.params()
    start = method.init(KEY, p)
    base = methods.apply_edits(p, start.edits)
    trains = [jax.tree.map(lambda x, d=d: x + d, start.train) for d in (0.0, 0.1)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *trains)

    def hidden(train):
        return m.hidden(method.bind(base, train, start.state, Context()), tiny.batch())[0]

    out = jax.jit(jax.vmap(hidden))(both)
    for i, train in enumerate(trains):
        np.testing.assert_allclose(out[i], jax.jit(hidden)(train), atol=1e-5)
    assert np.abs(out[0] - out[1]).max() > 1e-3


def test_the_report_counts_what_trains(method):
    p = tiny.params()
    found = report.describe(method, p, method.init(KEY, p))
    every = sum(x.size for x in jax.tree.leaves(method.init(KEY, p).train))
    assert found.trained == every
    assert not found.warnings
    assert 0.9 * every <= sum(e.parameters for e in found.entries) <= every
