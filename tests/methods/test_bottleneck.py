"""Bottleneck adapters against the papers' formula in numpy, at the branches of a tiny model; AdapterDrop."""

import branches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from branches import DOWN, OUT, noisy

from tunejax.core import bottleneck, errors, paths
from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.methods import adapter, bitfit, norms
from tunejax.models import cut

KEY = jax.random.key(0)
RUN = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh, "silu": lambda x: x / (1 + np.exp(-x))}
CASES = [(tiny.LLAMA, "lm"), (tiny.BERT, "mlm")]


def by_hand(h, arrays, layer, act, scale):
    a = {k: np.asarray(x)[layer] for k, x in arrays.items()}
    return h + scale * (RUN[act](h @ a["down"] + a["down_bias"]) @ a["up"] + a["up_bias"])


@pytest.mark.parametrize(("config", "head"), CASES)
def test_the_formula(config, head):
    m, p = tiny.model(config, head), tiny.params(config, head)
    method = adapter.houlsby(width=5, activation="tanh", scale=0.5)
    train = noisy(method.init(KEY, p).train)
    assert set(train) == {DOWN, OUT}
    plain = branches.of(m, p)
    both = branches.of(m, method.bind(p, train, {}, Context()))
    first = by_hand(plain["attention"][0], train[OUT], 0, "tanh", 0.5)
    np.testing.assert_allclose(both["attention"][0], first, rtol=1e-5, atol=1e-5)
    only = adapter.pfeiffer(width=5, activation="tanh", scale=0.5)
    assert set(only.init(KEY, p).train) == {DOWN}
    one = branches.of(m, only.bind(p, {DOWN: train[DOWN]}, {}, Context()))
    second = by_hand(plain["mlp"][0], train[DOWN], 0, "tanh", 0.5)
    np.testing.assert_allclose(one["mlp"][0], second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reads", ["sum", "residual"])
@pytest.mark.parametrize(("config", "head"), CASES)
def test_what_acts_where_the_mlp_joins(config, head, reads):
    m, p = tiny.model(config, head), tiny.params(config, head)
    method = adapter.pfeiffer(width=5, activation="tanh", scale=0.5, reads=reads)
    train = noisy(method.init(KEY, p).train)
    plain, both = branches.of(m, p), branches.of(m, method.bind(p, train, {}, Context()))
    x, after = branches.entrance(p, config) + plain["attention"][0], config.kind == "encoder"
    x = branches.block_norm(p, config, "attention", x) if after else x
    h = {"sum": plain["hidden"][0], "residual": x}[reads]  # the sum as the block without it gives it
    total = x + plain["mlp"][0] + by_hand(h, train[DOWN], 0, "tanh", 0.5) - h
    expected = branches.block_norm(p, config, "mlp", total) if after else total
    seen = tiny.batch()["segment_ids"] > 0
    np.testing.assert_allclose(both["hidden"][0][seen], expected[seen], rtol=1e-5, atol=1e-5)


def test_two_where_attention_joins():
    """The second reads the sum with what the first adds; a closed gate takes both away."""
    m, p = tiny.model(), tiny.params()
    both = [adapter.pfeiffer("attention/o/kernel", width=w, activation="tanh", reads="sum") for w in (5, 3)]
    method = methods.chain(*both)
    train = noisy(method.init(KEY, p).train)
    bound = method.bind(p, train, method.init(KEY, p).state, Context())
    plain, found = branches.of(m, p), branches.of(m, bound)
    total = branches.entrance(p, tiny.LLAMA) + plain["attention"][0]
    for part in train.values():
        total = by_hand(total, part[OUT], 0, "tanh", 1.0)
    np.testing.assert_allclose(found["hidden"][0], total + found["mlp"][0], rtol=1e-5, atol=1e-5)
    closed = paths.replace(bound, {"layers/0/gate": jnp.zeros(3)})
    np.testing.assert_allclose(branches.of(m, closed)["hidden"][-1], branches.entrance(p, tiny.LLAMA), atol=1e-6)
    with pytest.raises(errors.NotLinear, match="attention/join"):
        method.merge(p, train, method.init(KEY, p).state)
    with pytest.raises(errors.ConfigError, match="attention/join"):
        cut.masks(bound, tiny.LLAMA)


@pytest.mark.parametrize("activation", RUN)
def test_each_layer_has_its_own(activation):
    p = tiny.params()
    method = adapter.pfeiffer(width=5, activation=activation, scale=2.0)
    train = noisy(method.init(KEY, p).train)
    op = jax.tree.map(lambda x: x[2], paths.get(method.bind(p, train, {}, Context()), DOWN))
    x, bias = jax.random.normal(KEY, (4, 24)), jnp.arange(16.0)
    h = np.asarray(x) @ np.asarray(paths.get(p, DOWN)[2]) + np.arange(16.0)
    np.testing.assert_allclose(op(x, bias), by_hand(h, train[DOWN], 2, activation, 2.0), rtol=1e-5, atol=1e-5)
    assert op.shape == (24, 16)


@pytest.mark.parametrize("make", [adapter.houlsby, adapter.pfeiffer])
def test_identity_at_the_start_and_no_kernel(make):
    m, p = tiny.model(), tiny.params()
    start = make(reduction_factor=4).init(KEY, p)
    assert start.train[DOWN]["down"].shape == (3, 16, 4)
    assert start.train[DOWN]["down"].any()
    bound = make(reduction_factor=4).bind(p, start.train, {}, Context())
    np.testing.assert_array_equal(tiny.outputs(m, p), tiny.outputs(m, bound))
    with pytest.raises(errors.NotLinear, match=DOWN):
        make().merge(p, make().init(KEY, p).train, {})


def test_houlsbys_whole_recipe_is_a_chain():
    p = tiny.params()
    start = methods.chain(adapter.houlsby(width=2), norms.norm_tuning(), bitfit.bitfit("mlp/down/bias")).init(KEY, p)
    assert set(start.edits) == {"layers/0/attention/norm/scale", "layers/0/mlp/norm/scale", "norm/scale"}


def test_drop_first_leaves_the_first_layers_as_they_were():
    method = adapter.houlsby(width=5, drop_first=2)
    assert method.cuts(3) == (2,)
    m, p = tiny.model(cuts=(2,)), tiny.params(cuts=(2,))
    train = noisy(method.init(KEY, p).train)
    assert set(train) == {DOWN.replace("0", "1", 1), OUT.replace("0", "1", 1)}
    plain, both = branches.of(m, p), branches.of(m, method.bind(p, train, {}, Context()))
    np.testing.assert_array_equal(plain["hidden"][:2], both["hidden"][:2])
    assert np.abs(plain["hidden"][2] - both["hidden"][2]).max() > 1e-2


def test_drop_random_skips_the_first_n_layers_of_every_site():
    m, p = tiny.model(cuts=(2,)), tiny.params(cuts=(2,))
    method = adapter.houlsby(width=5, drop_random=2)
    train = noisy(method.init(KEY, p).train)
    seen = set()
    for i in range(12):
        bound = method.bind(p, train, {}, Context(key=jax.random.key(i), train=True))
        ops = [x for x in paths.flatten(bound).values() if isinstance(x, bottleneck.Bottleneck)]
        assert len(ops) == len(train)
        for site in ("attention/o", "mlp/down"):
            on = [bound["layers"][s][site.split("/")[0]][site.split("/")[1]]["kernel"].on for s in bound["layers"]]
            seen.add(tuple(np.concatenate(on).tolist()))
        last = np.concatenate(on)
    # never all off, and always a run of layers from the bottom
    assert seen == {(True, True, True), (False, True, True), (False, False, True)}
    plain, some = branches.of(m, p), branches.of(m, bound)
    off = int((~last).sum())
    np.testing.assert_array_equal(plain["hidden"][:off], some["hidden"][:off])
    assert np.abs(plain["hidden"][off] - some["hidden"][off]).max() > 1e-2
    moved = adapter.houlsby(width=5, drop_random=2, reads="sum").bind(p, train, {}, Context(key=KEY, train=True))
    assert moved["layers"]["0"]["mlp"]["join"].inner.on.shape == (2,)
    assert all(x.on is None for x in paths.flatten(method.bind(p, train, {}, Context(key=KEY))).values()
               if isinstance(x, bottleneck.Bottleneck))  # fmt: skip


def test_drop_random_has_no_gradient_where_it_skips():
    p = tiny.params()
    m, method = tiny.model(), adapter.pfeiffer(width=5, drop_random=2)
    train = noisy(method.init(KEY, p).train)

    @jax.jit
    def grads(key):
        def total(train):
            bound = method.bind(p, train, {}, Context(key=key, train=True))
            return jnp.sum(m.hidden(bound, tiny.batch())[0] ** 2), paths.get(bound, DOWN).on

        return jax.grad(total, has_aux=True)(train)

    for i in range(4):
        g, on = grads(jax.random.key(i))
        moved = np.abs(np.asarray(g[DOWN]["up"])).max(axis=(1, 2)) > 0
        np.testing.assert_array_equal(moved, on)


def test_axes():
    method = adapter.pfeiffer(width=4)
    axes = method.axes(tiny.model().axes, jax.eval_shape(method.init, KEY, tiny.params()).train)[DOWN]
    assert axes == {
        "down": ("layers", "embed", None),
        "down_bias": ("layers", None),
        "up": ("layers", None, "embed"),
        "up_bias": ("layers", "embed"),
    }


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"activation": "rellu"}, "relu"),
        ({"width": 0}, "at least 1"),
        ({"reduction_factor": 0}, "positive"),
        ({"drop_first": -1}, "at least 0"),
        ({"drop_first": 1, "layers": "2:"}, "one of them"),
        ({"reads": "summ"}, "sum"),
    ],
)
def test_bad_arguments(bad, says):
    with pytest.raises(errors.ConfigError, match=says):
        adapter.houlsby(**bad)


def test_joins_are_where_branches_end():
    with pytest.raises(errors.TargetError, match="attention/o/kernel or mlp/down/kernel"):
        adapter.pfeiffer("mlp/up/kernel", reads="sum").init(KEY, tiny.params())


def test_drops_that_leave_nothing():
    with pytest.raises(errors.ConfigError, match="0 to 2"):
        adapter.houlsby(drop_random=3).init(KEY, tiny.params())
    with pytest.raises(errors.ConfigError, match="no layer"):
        adapter.houlsby(drop_first=3).cuts(3)
