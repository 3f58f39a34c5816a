"""The laws of methods, on small methods written here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import Doubled, Squared, hole, shift, wrapper

from tunejax.core import errors, operators, paths
from tunejax.core import method as methods
from tunejax.core.method import Context

KEY = jax.random.key(0)
EVERY = "/layers/**/kernel"


def begin(method, params):
    start = method.init(KEY, params)
    return methods.apply_edits(params, start.edits), start


def test_order_matters_for_nested_operators():
    p = tiny.params()
    for first, second in ((Doubled, Squared), (Squared, Doubled)):
        chained = methods.chain(wrapper("a", first), wrapper("b", second))
        base, start = begin(chained, p)
        leaf = paths.get(chained.bind(base, start.train, start.state, Context()), "layers/0/attention/q/kernel")
        assert type(leaf) is second
        assert type(leaf.base) is first


def test_chain_is_associative():
    a, b, c = shift("a"), hole("b", "norm/scale"), shift("c", "mlp/up/kernel")
    left, right = methods.chain(methods.chain(a, b), c), methods.chain(a, methods.chain(b, c))
    p = tiny.params()
    one, two = left.init(KEY, p), right.init(KEY, p)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))
    assert left.name == right.name == "a+b+c"
    assert methods.chain(a) is a


def test_two_that_rewrite_one_path_are_refused():
    p = tiny.params()
    with pytest.raises(errors.TargetError, match=r"two and one both rewrite norm/scale|both rewrite"):
        methods.chain(hole("one", "/norm/scale"), hole("two", "norm/scale")).init(KEY, p)
    with pytest.raises(errors.TargetError, match="put late first"):
        methods.chain(shift("early"), hole("late", "attention/q/kernel")).init(KEY, p)


def test_identity_at_the_start_and_merge_equals_bind():
    m, p = tiny.model(), tiny.params()
    method = methods.chain(hole("h", "norm/scale"), shift("s", EVERY))
    base, start = begin(method, p)
    before = tiny.outputs(m, p)
    np.testing.assert_array_equal(before, tiny.outputs(m, method.bind(base, start.train, start.state, Context())))
    moved = jax.tree.map(lambda x: x + 0.05, start.train)
    bound = tiny.outputs(m, method.bind(base, moved, start.state, Context()))
    merged = method.merge(base, moved, start.state)
    assert all(operators.is_array(x) for x in paths.flatten(merged).values() if x is not None)
    np.testing.assert_allclose(bound, tiny.outputs(m, merged), atol=1e-5)
    assert np.abs(np.asarray(bound) - before).max() > 1e-3


def test_init_survives_eval_shape_and_train_vmaps():
    m, p = tiny.model(), tiny.params()
    method = methods.chain(hole("h", "/norm/scale"), shift("s"))
    shapes = jax.eval_shape(method.init, KEY, p)
    base, start = begin(method, p)
    assert jax.tree.map(lambda x: x.shape, shapes.train) == jax.tree.map(lambda x: x.shape, start.train)
    two = jax.tree.map(lambda x: jnp.stack([x, x + 0.1]), start.train)
    out = jax.vmap(lambda t: tiny.outputs(m, method.bind(base, t, start.state, Context())))(two)
    alone = tiny.outputs(m, method.bind(base, jax.tree.map(lambda x: x + 0.1, start.train), start.state, Context()))
    np.testing.assert_allclose(out[1], alone, atol=1e-5)


def test_only_train_has_gradients():
    m, p = tiny.model(), tiny.params()
    method = methods.chain(hole("h", "/norm/scale"), shift("s"))
    base, start = begin(method, p)

    def loss(train):
        return jnp.sum(tiny.outputs(m, method.bind(base, train, start.state, Context())) ** 2)

    grads = jax.grad(loss)(start.train)
    assert jax.tree.structure(grads) == jax.tree.structure(start.train)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    kept, moved = jax.tree.leaves(base), jax.tree.leaves(start.train)
    assert not {id(x) for x in kept} & {id(x) for x in moved}


def test_axes_follow_the_kernel():
    m, p = tiny.model(), tiny.params()
    method = methods.chain(hole("h", "/norm/scale"), shift("s", "attention/q/kernel"))
    axes = method.axes(m.axes, method.init(KEY, p).train)
    assert axes["0:h"]["norm/scale"] == ("embed",)
    assert axes["1:s"]["layers/0/attention/q/kernel"] == {"s": ("layers", None, "heads")}


def test_cuts_join():
    parts = [
        methods.per_site("x", EVERY, lambda k, w: {}, lambda k, a, c: k, layers=text) for text in ("-2:", "1:3", None)
    ]
    assert methods.chain(*parts).cuts(6) == (1, 3, 4)


def test_a_site_needs_a_kernel():
    with pytest.raises(errors.TargetError, match="needs a kernel"):
        shift("s", "/norm/scale").init(KEY, tiny.params())


def ones(k):
    return jnp.ones((*k.shape[:-2], k.shape[-1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"new": lambda key, k: ones(k)}, "new returned an array, expected arrays by name, or a Site of such"),
        ({"new": lambda key, k: methods.Site(ones(k))}, "new returned Site, expected arrays by name"),
        ({"new": lambda key, k: None}, "new returned NoneType"),
        ({"shared": lambda key, sites: jnp.ones(3)}, "shared returned an array"),
        ({"axes": {"s": ("inn", "out")}}, r"axes of 's' has 'inn'; expected 'in', 'out' or None. Did you mean 'in'"),
        ({"axes": {"ss": ("out",)}}, r"axes names 'ss', and there is no such array. Did you mean 's'"),
        ({"rates": {"ss": 2.0}}, r"rates names 'ss', and there is no such array. Did you mean 's'"),
        (
            {"wrap": lambda k, a, ctx: None},
            "wrap returned NoneType at layers/0/attention/q/kernel, expected an operator",
        ),
        (
            {"new": lambda key, k: {"s": ones(k).astype(int)}},
            "layers/0/attention/q/kernel/s is to train and of type int",
        ),
    ],
)
def test_mistakes_in_a_method_of_ones_own_name_it(change, said):
    own = {"new": lambda key, k: {"s": ones(k)}, "wrap": lambda k, a, ctx: k, **change}

    def used():
        method = methods.per_site("own", "attention/q/kernel", **own)
        method.bind(tiny.params(), method.init(KEY, tiny.params()).train, {}, Context())

    with pytest.raises(errors.ConfigError, match=f"method 'own': {said}"):
        used()


def test_a_start_is_what_init_returns():
    other = methods.method("mine", lambda key, params: {"w": jnp.ones(3)}, lambda params, *_: params)
    with pytest.raises(errors.ConfigError, match="method 'mine': init returned dict, expected a Start"):
        other.init(KEY, tiny.params())
