"""AdapterFusion against its formula in numpy, and stacks of adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trains
from branches import noisy

from tunejax.core import errors, paths
from tunejax.core.method import Context, apply_edits
from tunejax.methods import fusion, registry

KEY, DOWN, OUT = jax.random.key(0), "layers/0/mlp/down/kernel", "layers/0/attention/o/kernel"


def adapters(widths=(3, 5), config=tiny.LLAMA, head="lm", name="pfeiffer"):
    """What adapters of these widths trained: noise."""
    p = tiny.params(config, head)
    made = [registry.build({"name": name, "width": w}).init(jax.random.key(w), p).train for w in widths]
    return [jax.tree.map(lambda x, i=i: x + 0.1 * i, noisy(t)) for i, t in enumerate(made)]


def reference(h, trees, t, layer):
    """h [tokens, out] -> [tokens, out], one adapter and one token after another."""
    out = np.zeros_like(h)
    for i, row in enumerate(h):
        z = []
        for tree in trees:
            a = {k: np.asarray(v[layer]) for k, v in tree[DOWN].items()}
            z.append(row + np.maximum(row @ a["down"] + a["down_bias"], 0) @ a["up"] + a["up_bias"])
        scores = np.array([(row @ t["query"][layer]) @ (x @ t["key"][layer]) for x in z])
        weights = np.exp(scores - scores.max())
        out[i] = sum(w * (x @ t["value"][layer]) for w, x in zip(weights / weights.sum(), z, strict=True))
    return out


def test_the_formula_for_adapters_of_two_widths():
    p, trees = tiny.params(), adapters()
    method = fusion.adapter_fusion(trees)
    start = method.init(KEY, p)
    train = noisy(start.train)
    bound = paths.get(method.bind(p, train, start.state, Context()), DOWN)
    x = np.random.default_rng(0).standard_normal((2, 3, 24)).astype(np.float32)
    t = jax.tree.map(np.asarray, train[DOWN])
    for layer in (0, 2):
        kernel = np.asarray(paths.get(p, DOWN)[layer])
        found = jax.tree.map(lambda v, i=layer: v[i], bound)(jnp.asarray(x))
        expected = reference(x.reshape(6, 24) @ kernel, trees, t, layer)
        np.testing.assert_allclose(found.reshape(6, 16), expected, atol=1e-4)


@pytest.mark.parametrize(("config", "head", "name"), [(tiny.LLAMA, "lm", "pfeiffer"), (tiny.BERT, "mlm", "houlsby")])
def test_of_equal_adapters_it_starts_as_that_adapter(config, head, name):
    m, p = tiny.model(config, head), tiny.params(config, head)
    one = adapters((4,), config, head, name)[0]
    method = fusion.adapter_fusion([one, one, one])
    start = method.init(KEY, p)
    bound = method.bind(p, start.train, start.state, Context())
    alone = registry.build({"name": name, "width": 4}).bind(p, one, {}, Context())
    np.testing.assert_allclose(tiny.outputs(m, bound), tiny.outputs(m, alone), atol=2e-5)
    assert float(method.penalty(start.train, start.state, Context())) == 0
    assert set(start.train) == set(one)
    shapes = jax.eval_shape(method.init, KEY, p)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), start)


def test_the_penalty():
    method = fusion.adapter_fusion(adapters(), regularization=0.5)
    train = method.init(KEY, tiny.params()).train
    moved = {DOWN: {**train[DOWN], "value": train[DOWN]["value"] + 0.1}}
    np.testing.assert_allclose(method.penalty(moved, {}, Context()), 0.5 * 0.01 * 3 * 16 * 16, rtol=1e-4)


def test_the_adapters_stand_still_while_their_mix_trains_on_eight_devices():
    method = fusion.adapter_fusion(adapters())
    one, end = trains.run(method, learning_rate=3e-3, shape=(2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, end.state, fusion.fuse(adapters()))
    assert one == sorted(one, reverse=True)


def test_adapters_of_some_layers_are_mixed_there_however_else_the_stack_is_cut():
    pair = [{p.replace("0", "1"): {k: x[1:] for k, x in a.items()} for p, a in t.items()} for t in adapters()]
    method = registry.build([{"name": "adapter_fusion", "adapters": pair}, {"name": "pfeiffer", "layers": "2:"}])
    assert method.cuts(3) == (1, 2)
    p = tiny.params(cuts=(1, 2))
    start = method.init(KEY, p)
    assert set(start.train["0:adapter_fusion"]) == {f"layers/{i}/mlp/down/kernel" for i in (1, 2)}
    bound = method.bind(apply_edits(p, start.edits), start.train, start.state, Context())
    whole = fusion.adapter_fusion(adapters())
    first = whole.init(KEY, tiny.params())
    every = paths.get(whole.bind(tiny.params(), first.train, first.state, Context()), DOWN)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 24)), jnp.float32)
    one = paths.get(bound, "layers/1/mlp/down/kernel")
    mix = start.train["0:adapter_fusion"]["layers/1/mlp/down/kernel"]
    same = dataclasses.replace(every, **{k: mix[k][jnp.zeros(3, int)] for k in fusion.TRAINED})
    found, expected = (jax.tree.map(lambda v, i=i: v[i], op)(x) for op, i in ((one, 0), (same, 1)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_stack_of_two_adapters_is_one_after_the_other():
    p, (first, second) = tiny.params(), adapters()
    method = registry.build([{"name": "pfeiffer", "width": 3}, {"name": "pfeiffer", "width": 5}])
    base = apply_edits(p, method.init(KEY, p).edits)
    bound = method.bind(
        base, {"0:pfeiffer": first, "1:pfeiffer": second}, {"0:pfeiffer": {}, "1:pfeiffer": {}}, Context()
    )
    x = np.random.default_rng(0).standard_normal((6, 24)).astype(np.float32)
    h = x @ np.asarray(paths.get(p, DOWN)[1])
    for tree in (first, second):
        a = {k: np.asarray(v[1]) for k, v in tree[DOWN].items()}
        h = h + np.maximum(h @ a["down"] + a["down_bias"], 0) @ a["up"] + a["up_bias"]
    found = jax.tree.map(lambda v: v[1], paths.get(bound, DOWN))(jnp.asarray(x))
    np.testing.assert_allclose(found, h, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[:1], "two adapters at least"),
        (lambda t: [t[0], {DOWN: {"a": 1}}], "adapter 1 is not what a bottleneck adapter trains"),
        (lambda t: [t[0], 3], "adapter 1 is not"),
        (lambda t: [t[0], {OUT: t[1][DOWN]}], "adapter 1 stands at layers/0/attention/o/kernel"),
        (lambda t: [{"x/kernel": x[DOWN]} for x in t], "the model has nothing"),
        (lambda t: [{"layers/0/mlp/up/kernel": x[DOWN]} for x in t], r"a kernel of shape \(3, 16, 24\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    with pytest.raises(errors.TunejaxError, match=said):
        fusion.adapter_fusion(change(adapters())).init(KEY, tiny.params())
