"""Trained adapters below a new one, against the formula in numpy and against the chain that would train them all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trains
from branches import noisy

from tunejax.core import errors, operators, paths, taken
from tunejax.core.method import Context, apply_edits, chain
from tunejax.methods import registry, report, stack

KEY, DOWN, OUT = jax.random.key(0), "layers/0/mlp/down/kernel", "layers/0/attention/o/kernel"


def trained(spec, config=tiny.LLAMA, head="lm"):
    """(method, what it might have trained: its start plus noise, with paths that say layers) of a description."""
    method = registry.build(spec)
    cuts = method.cuts(config.num_layers)
    train = noisy(method.init(jax.random.key(1), tiny.params(config, head, cuts)).train)
    starts = paths.starts(cuts)
    return method, {f"layers/{starts[p.split('/')[1]]}/{p.split('/', 2)[2]}": x for p, x in train.items()}


def pfeiffer(width, **others):
    return trained({"name": "pfeiffer", "width": width, **others})


def bound(method, config=tiny.LLAMA, head="lm", train=None):
    """The parameters that a method binds to a model that is cut as it wants."""
    p = tiny.params(config, head, method.cuts(config.num_layers))
    start = method.init(KEY, p)
    return method.bind(apply_edits(p, start.edits), start.train if train is None else train, start.state, Context())


def test_the_formula_at_a_site():
    (_, first), (_, second) = pfeiffer(3), pfeiffer(5)
    method = stack.adapter_stack([first, second])
    at = paths.get(bound(method), DOWN)
    x = np.random.default_rng(0).standard_normal((6, 24)).astype(np.float32)
    for layer in (0, 2):
        h = x @ np.asarray(paths.get(tiny.params(), DOWN)[layer])
        for tree in (first, second):
            a = {k: np.asarray(v[layer]) for k, v in tree[DOWN].items()}
            h = h + np.maximum(h @ a["down"] + a["down_bias"], 0) @ a["up"] + a["up_bias"]
        found = jax.tree.map(lambda v, i=layer: v[i], at)(jnp.asarray(x))
        np.testing.assert_allclose(found, h, atol=1e-4)


KINDS = {
    "two places": [{"name": "houlsby", "width": 3}, {"name": "pfeiffer", "width": 5}],
    "first layers left out": [{"name": "pfeiffer", "width": 3, "drop_first": 1}, {"name": "houlsby", "width": 2}],
    "one layer and the last two": [{"name": "pfeiffer", "width": 3, "layers": "1:2"},
                                   {"name": "pfeiffer", "width": 4, "layers": "-2:"}],
    "sums": [{"name": "pfeiffer", "width": 3, "reads": "sum"}, {"name": "pfeiffer", "width": 2, "reads": "sum"}],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("config", "head"), [(tiny.LLAMA, "lm"), (tiny.BERT, "mlm")])
def test_it_is_the_chain_of_what_trained_them(kind, config, head):
    methods, trees = zip(*(trained(spec, config, head) for spec in KINDS[kind]), strict=True)
    reads = KINDS[kind][0].get("reads", "branch")
    method = stack.adapter_stack(list(trees), reads=reads)
    both = chain(*methods)
    cuts = both.cuts(config.num_layers)
    assert method.cuts(config.num_layers) == cuts
    m, p = tiny.model(config, head, cuts), tiny.params(config, head, cuts)
    by_hand = {}
    for key, one, tree in zip(both.init(KEY, p).train, methods, trees, strict=True):
        by_hand[key] = one.init(KEY, p).train
        for path in by_hand[key]:  # each segment of this model from the adapter's own layers
            segment = next(s for s in paths.segments(p) if path in s)
            rest = path.split("/", 2)[2]
            ((first, arrays),) = ((int(q.split("/")[1]), x) for q, x in tree.items() if q.endswith(rest))
            where = slice(segment.start - first, segment.start - first + segment.size)
            by_hand[key][path] = {k: x[where] for k, x in arrays.items()}
    expected = tiny.outputs(m, both.bind(p, by_hand, {k: {} for k in by_hand}, Context()))
    found = tiny.outputs(m, bound(method, config, head))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - tiny.outputs(m, p)).max() > 1e-2


@pytest.mark.parametrize("above", [{}, {"drop_first": 1}, {"layers": "1:2"}])
def test_below_a_new_one_it_stands_still_and_nothing_changes_at_the_start(above):
    """Also where the new one cuts the stack."""
    (_, low), spec = pfeiffer(3), {"name": "pfeiffer", "width": 4, **above}
    alone = tiny.outputs(tiny.model(), bound(stack.adapter_stack([low])))
    method = registry.build([{"name": "adapter_stack", "adapters": [low]}, spec])
    cuts = method.cuts(3)
    np.testing.assert_allclose(tiny.outputs(tiny.model(cuts=cuts), bound(method)), alone, atol=1e-6)
    losses, end = trains.run(method, learning_rate=3e-3, shape=(2, 2, 2))
    assert losses == sorted(losses, reverse=True)
    assert set(end.train["0:adapter_stack"]) == set()
    (kept,) = stack.apart(end.state["0:adapter_stack"])
    assert list(kept) == [f"layers/{i}/mlp/down/kernel" for i in range(len(cuts) + 1)]
    jax.tree.map(np.testing.assert_array_equal, np.concatenate([x["up"] for x in kept.values()]), low[DOWN]["up"])


def test_pieces_of_one_adapter_are_joined_and_layers_apart_are_not():
    whole = {k: np.asarray(x) for k, x in pfeiffer(3)[1][DOWN].items()}
    one, two = "layers/1/mlp/down/kernel", "layers/2/mlp/down/kernel"
    pieces = {p: {k: x[i : i + 1] for k, x in whole.items()} for i, p in enumerate((DOWN, one, two))}
    backwards = {p: pieces[p] for p in (two, one, DOWN)} | {OUT: whole}
    jax.tree.map(np.testing.assert_array_equal, taken.joined(backwards), {DOWN: whole, OUT: whole})
    apart = {p: pieces[p] for p in (DOWN, two)}
    jax.tree.map(np.testing.assert_array_equal, taken.joined(apart), apart)
    assert taken.cuts([apart])(3) == (1, 2)


def test_the_report_says_where_it_stands():
    method = registry.build([{"name": "adapter_stack", "adapters": [pfeiffer(3)[1]]}, {"name": "bitfit"}])
    found = report.describe(method, tiny.params(), method.init(KEY, tiny.params()))
    first = found.entries[0]
    assert (first.pattern, first.leaves, first.parameters) == ("/layers/*/mlp/down/kernel", 1, 0)
    assert first.matched == {"layers/*/mlp/down/kernel": [0, 1, 2]}
    assert not found.warnings


def test_shapes_alone_and_its_own_state_give_it_again():
    method = stack.adapter_stack([pfeiffer(3)[1], trained({"name": "houlsby", "width": 2})[1]])
    start = method.init(KEY, tiny.params())
    shapes = jax.eval_shape(method.init, KEY, tiny.params())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), start)
    again = stack.adapter_stack(stack.apart(start.state)).init(KEY, tiny.params())
    jax.tree.map(np.testing.assert_array_equal, again.state, start.state)


def test_it_has_no_plain_kernel():
    with pytest.raises(errors.NotLinear, match=f"{DOWN}: a bottleneck adapter with relu is no kernel"):
        operators.densify(bound(stack.adapter_stack([pfeiffer(3)[1]])))


@pytest.mark.parametrize(
    ("adapters", "options", "said"),
    [
        (lambda t: [], {}, "adapter_stack: there must be one adapter at least; found 0"),
        (lambda t: [t, {DOWN: {"a": 1}}], {}, "adapter 1 is not what a bottleneck adapter trains"),
        (lambda t: [{}], {}, "adapter 0 is not"),
        (lambda t: [t], {"activation": "rellu"}, "relu"),
        (lambda t: [t], {"reads": "sums"}, "Did you mean 'sum'"),
        (lambda t: [{"layers/0/attention/q/kernel": t[DOWN]}], {"reads": "sum"}, "where a branch joins the residual"),
        (lambda t: [{"x/kernel": jax.tree.map(lambda x: x[0], t[DOWN])}], {}, "the model has nothing there"),
        (lambda t: [{"layers/0/mlp/up/kernel": t[DOWN]}], {}, r"a kernel of shape \(3, 16, 24\)"),
        (lambda t: [{DOWN.replace("0", "1"): t[DOWN]}], {}, "an adapter is of layers 1 to 3; the model has 3"),
        (lambda t: [jax.tree.map(lambda x: x[:2], t)], {}, r"within a segment of the stack.*cuts=\(0, 2\)"),
    ],
)
def test_what_does_not_fit_is_told(adapters, options, said):
    with pytest.raises(errors.TunejaxError, match=said):
        stack.adapter_stack(adapters(pfeiffer(3)[1]), **options).init(KEY, tiny.params())
