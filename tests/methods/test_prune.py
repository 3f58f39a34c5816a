"""Pruning of single weights: what is kept, by numpy; in a run, merged, and beside other methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trains

from tunejax.core import errors, operators, paths
from tunejax.core.method import Context
from tunejax.methods import prune, registry
from tunejax.models import cut

UP = "layers/0/mlp/up/kernel"


def update(method, params, times=1):
    start = method.init(jax.random.key(0), params)
    state = start.state
    for _ in range(times):
        now = state
        state = method.update({}, now, {}, Context(params=lambda s=now: method.bind(params, {}, s, Context())))
    return state


def test_the_greatest_of_each_layers_kernel_are_kept():
    p = tiny.params()
    kept = np.asarray(update(prune.prune(density=0.3, schedule="one_shot"), p)["kept"][UP])
    for layer, mask in zip(np.abs(np.asarray(paths.get(p, UP))), kept, strict=True):
        assert mask.sum() == round(0.3 * 16 * 24)
        assert layer[mask].min() >= layer[~mask].max()


def test_two_of_four_along_the_input():
    p = tiny.params()
    kept = np.asarray(update(prune.prune("mlp/{up,down}/kernel", pattern="2:4", schedule="one_shot"), p)["kept"][UP])
    expected = np.zeros_like(kept)
    weights = np.abs(np.asarray(paths.get(p, UP)))
    for layer in range(3):
        for group in range(0, 16, 4):
            for column in range(24):
                best = np.argsort(-weights[layer, group : group + 4, column])[:2]
                expected[layer, group + best, column] = True
    np.testing.assert_array_equal(kept, expected)


def test_ever_fewer_and_none_comes_back():
    method, p = prune.prune("mlp/up/kernel", pattern="1:4", steps=3, every=1), tiny.params()
    counts, before = [], None
    for times in range(5):
        kept = np.asarray(update(method, p, times)["kept"][UP])
        assert before is None or not np.any(kept & ~before)
        before = kept
        counts.append(kept.mean() * 4)
    np.testing.assert_allclose(counts, [4, 2, 2, 1, 1])


@pytest.mark.parametrize("first", ["full", {"name": "lora", "rank": 2, "targets": "**/layers/**/kernel"}, "ia3"])
def test_a_run_is_merged_with_its_zeros(first):
    spec = [first, {"name": "prune", "pattern": "2:4", "steps": 2, "every": 1}]
    one, s, base, batch = trains.begin(spec)
    for _ in range(3):
        s, _ = one(s, base, {}, batch)
    bound = one.method.bind(base, s.train, s.state, Context())
    merged = one.method.merge(base, s.train, s.state)
    kernel = np.asarray(paths.get(merged, UP))
    assert ((kernel.reshape(3, 4, 4, 24) != 0).sum(2) == 2).all()
    np.testing.assert_allclose(tiny.outputs(tiny.model(), merged), tiny.outputs(tiny.model(), bound), atol=1e-5)


def test_biases_of_what_stands_below_are_kept():
    p = tiny.params(tiny.BERT, "mlm")
    method = registry.build(["ia3", {"name": "prune", "targets": "attention/k/kernel"}])
    start = method.init(jax.random.key(0), p)
    train = jax.tree.map(lambda x: x + 0.5, start.train)
    bound, merged = method.bind(p, train, start.state, Context()), method.merge(p, train, start.state)
    assert operators.is_operator(paths.get(bound, "layers/0/attention/k/kernel"))
    m = tiny.model(tiny.BERT, "mlm")
    np.testing.assert_allclose(tiny.outputs(m, bound), tiny.outputs(m, merged), atol=1e-5)


def test_before_shrink_both_hold():
    spec = ["full", {"name": "prune", "density": 0.5}, {"name": "shrink", "keep": {"mlp": 0.5}}]
    method = registry.build(spec)
    start = method.init(jax.random.key(0), tiny.params())
    masks = {p: jnp.asarray(np.random.default_rng(0).random(x.shape) < 0.5) for p, x in
             start.state["1:prune"]["kept"].items()}  # fmt: skip
    state = {**start.state, "1:prune": {**start.state["1:prune"], "kept": masks}}
    state["2:shrink"] = {**state["2:shrink"], "kept": {"mlp": jnp.broadcast_to(jnp.arange(24) < 12, (3, 24))}}
    bound = method.bind(tiny.params(), start.train, state, Context())
    small, config = cut.cut(cut.bare(bound), cut.masks(bound, tiny.LLAMA), tiny.LLAMA)
    np.testing.assert_allclose(tiny.outputs(tiny.model(config), small), tiny.outputs(tiny.model(), bound), atol=1e-5)
    np.testing.assert_array_equal(paths.get(small, UP) != 0, masks[UP][..., :12])


def test_bad_arguments():
    for arguments, says in (
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 0.5, "pattern": "2:4"}, "stands instead of a pattern"),
        ({"pattern": "4:2"}, "such as '2:4'"),
        ({"pattern": "half"}, "such as '2:4'"),
        ({"schedule": "stages"}, "schedule is 'stages'"),
    ):
        with pytest.raises(errors.ConfigError, match=says):
            prune.prune(**arguments)
    with pytest.raises(errors.ConfigError, match=r"does not divide the input of layers/0/attention/q/kernel, 16"):
        prune.prune("attention/q/kernel", pattern="1:3").init(jax.random.key(0), tiny.params())
    with pytest.raises(errors.TargetError, match="it needs a kernel"):
        prune.prune("norm/scale").init(jax.random.key(0), tiny.params())
    above = registry.build([{"name": "pfeiffer", "width": 4}, {"name": "prune"}])
    with pytest.raises(errors.TargetError, match="prune targets layers/0/mlp/down/kernel, and what a method before it"):
        jax.eval_shape(above.init, jax.random.key(0), tiny.params())
