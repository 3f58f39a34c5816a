"""Nested sizes of one network: what each keeps, and whose turn it is."""

import itertools

import jax
import numpy as np
import pytest
import tiny
import trains

from tunejax.core import errors, units
from tunejax.core.method import Context
from tunejax.methods import registry, supernet
from tunejax.models import cut
from tunejax.objectives import causal_lm
from tunejax.train import optimizer, step

KEEP = {"heads": 0.5, "mlp": 0.5, "depth": 0.34, "hidden": 0.75}


def masks(size, params, **more):
    method = supernet.supernet(KEEP, sizes=4, size=size, num_kv_heads=2, **more)
    start = method.init(jax.random.key(0), params)
    return cut.masks(method.bind(params, {}, start.state, Context()), tiny.QWEN3)


def test_each_size_is_a_part_of_the_one_before():
    p = tiny.params(tiny.QWEN3)
    found = [masks(i, p) for i in range(4)]
    assert [{k: int(m.sum(1)[0]) for k, m in f.items()} for f in found] == [
        {"heads": 2, "mlp": 24, "depth": 3, "hidden": 16},
        {"heads": 2, "mlp": 20, "depth": 2, "hidden": 15},
        {"heads": 1, "mlp": 16, "depth": 2, "hidden": 13},
        {"heads": 1, "mlp": 12, "depth": 1, "hidden": 12},
    ]
    for large, small in itertools.pairwise(found):
        assert all(np.all(large[k] | ~small[k]) for k in KEEP)
    best = np.argsort(-np.asarray(units.squares(p, "mlp", 24)), axis=1)[:, :12]
    assert all(set(row) == set(np.flatnonzero(m)) for row, m in zip(best.tolist(), found[3]["mlp"], strict=True))


def test_whose_turn_it_is():
    sizes = [int(supernet.sampled(Context(turn=i, key=jax.random.key(i)), 5)) for i in range(60)]
    assert set(sizes[::3]) == {0}
    assert set(sizes[1::3]) == {4}
    assert set(sizes[2::3]) == {1, 2, 3}
    assert {int(supernet.sampled(Context(turn=2, key=jax.random.key(i)), 2)) for i in range(9)} <= {0, 1}


def test_a_mixture_takes_each_dimension_by_itself():
    p = tiny.params(tiny.QWEN3)
    found = masks({"heads": 2, "mlp": 1}, p)
    assert {k: int(m.sum(1)[0]) for k, m in found.items()} == {"heads": 1, "mlp": 20, "depth": 3, "hidden": 16}
    for name, size in (("heads", 2), ("mlp", 1)):
        np.testing.assert_array_equal(found[name], masks(size, p)[name])


def test_mixed_turns_draw_each_dimension_by_itself():
    def of(i, name):
        return supernet.sampled(Context(turn=i % 3, key=jax.random.key(i)), 4, name)

    turns = np.arange(90)
    mlp, hidden = (np.asarray(jax.vmap(lambda i, name=name: of(i, name))(turns)) for name in ("mlp", "hidden"))
    assert set(mlp[::3]) == set(hidden[::3]) == {0}
    assert set(mlp[1::3]) == set(hidden[1::3]) == {3}
    assert len({*zip(mlp[2::3].tolist(), hidden[2::3].tolist(), strict=True)}) > 10
    method, p = supernet.supernet(KEEP, sizes=4, num_kv_heads=2, mixed=True), tiny.params(tiny.QWEN3)
    state = method.init(jax.random.key(0), p).state
    i = int(next(t for t in turns[2::3] if mlp[t] != hidden[t]))
    found = cut.masks(method.bind(p, {}, state, Context(train=True, turn=2, key=jax.random.key(i))), tiny.QWEN3)
    assert found["mlp"].sum(1)[0] == [24, 20, 16, 12][mlp[i]]
    assert found["hidden"].sum(1)[0] == [16, 15, 13, 12][hidden[i]]


def test_the_micro_batches_of_a_step_take_turns():
    """A step of three equals the mean over the three sizes, each on its own rows."""
    one, s, base, _ = trains.begin([{"name": "full"}, {"name": "supernet", "keep": {"mlp": 0.25}, "sizes": 3}])
    rows = trains.rows(count=6)
    adamw = optimizer.make_optimizer("adamw", 1e-2)
    whole = step.make_step(one.model, one.method, causal_lm.make(), adamw, mesh=one.mesh, accumulate=3)
    losses = []
    for size in (0, 2, 1):
        method = registry.build(
            [{"name": "full"}, {"name": "supernet", "keep": {"mlp": 0.25}, "sizes": 3, "size": size}]
        )
        own = step.make_step(one.model, method, causal_lm.make(), adamw, mesh=one.mesh)
        turn = (0, 2, 1).index(size)
        loss, weight = own.evaluate(s, base, {}, {k: v[turn::3] for k, v in rows.items()})["loss"]
        losses.append(float(loss) / float(weight))
    assert len(set(losses)) == 3
    _, metrics = whole(s, base, {}, whole.put(rows))
    np.testing.assert_allclose(float(metrics["loss"]), np.mean(losses), rtol=1e-5)


def test_bad_arguments():
    for arguments, says in (
        ({"keep": {"mpl": 0.5}}, "Did you mean 'mlp'"),
        ({"keep": {"mlp": 1.5}}, r"keep\[mlp\] is 1.5"),
        ({"sizes": 1}, "sizes is 1"),
        ({"size": 5}, "from 0 to 4"),
        ({"size": {"mlp": 5}}, "from 0 to 4"),
        ({"size": {"depth": 1}}, "of mlp"),
        ({"size": {"mpl": 1}}, "Did you mean 'mlp'"),
        ({"keep": {"heads": 0.5}}, "give num_kv_heads"),
    ):
        with pytest.raises(errors.ConfigError, match=says):
            supernet.supernet(**arguments)
