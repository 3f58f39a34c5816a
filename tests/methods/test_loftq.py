"""LoftQ against its algorithm in numpy, above the same quantiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import errors, operators, paths, quantized
from tunejax.core.method import Context, apply_edits
from tunejax.methods import loftq, registry

KEY = jax.random.key(0)
TWO = ["attention/q/kernel", "mlp/up/kernel"]
W = np.random.default_rng(0).standard_normal((2, 24, 16)).astype(np.float32)


def rounded(kind, w):
    return np.asarray(quantized.encoded(kind, jnp.asarray(w), 8).dense())


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_the_algorithm(kind):
    """One round after another, since an entry halfway between two levels may take either in another program."""
    change = np.zeros_like(W)
    for rounds in (1, 2, 3):
        base, a, b = loftq.split(jnp.asarray(W), kind, 3, rounds, 8)
        q = np.asarray(base.dense())
        np.testing.assert_array_equal(q, rounded(kind, W - change))
        u, s, vt = np.linalg.svd(W - q, full_matrices=False)
        np.testing.assert_allclose(a @ b, (u[..., :3] * s[:, None, :3]) @ vt[:, :3], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1) ** 2, s[:, :3], rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(b, axis=2) ** 2, s[:, :3], rtol=1e-4)
        change = np.asarray(jnp.matmul(a, b, precision="highest"))


def test_it_is_nearer_to_the_base_than_a_rounded_one_and_more_rounds_are_nearer():
    errors_of = {0: np.linalg.norm(W - rounded("nf4", W))}
    for rounds in (1, 5):
        base, a, b = loftq.split(jnp.asarray(W), "nf4", 3, rounds, 8)
        errors_of[rounds] = np.linalg.norm(W - base.dense() - a @ b)
    assert errors_of[5] < errors_of[1] < 0.9 * errors_of[0]


def test_the_model_starts_nearer_to_its_base_than_qlora():
    m, p, targets = (
        tiny.model(tiny.BERT, "mlm"),
        tiny.params(tiny.BERT, "mlm"),
        ["attention/q/kernel", "mlp/down/kernel"],
    )
    outputs, kernels = [], []
    for spec in (
        {"name": "loftq", "rank": 8, "kind": "int4", "targets": targets},
        [{"name": "quantize", "kind": "int4", "targets": targets}, {"name": "lora", "rank": 8, "targets": targets}],
    ):
        method = registry.build(spec)
        start = method.init(KEY, p)
        bound = method.bind(apply_edits(p, start.edits), start.train, start.state, Context())
        outputs.append(float(jnp.abs(tiny.outputs(m, bound) - tiny.outputs(m, p)).mean()))
        flat = {k: x for k, x in paths.flatten(bound).items() if operators.is_operator(x)}
        kernels.append([np.linalg.norm(x.dense() - paths.get(p, k)) for k, x in flat.items()])
    assert (np.array(kernels[0]) < 0.5 * np.array(kernels[1])).all()
    assert outputs[0] < 0.7 * outputs[1]


def test_start_scale_types_and_shapes_alone():
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params())
    method = registry.build({"name": "loftq", "r": 2, "lora_alpha": 6.0, "loftq_iter": 2, "targets": TWO})
    start = method.init(KEY, p)
    shapes = jax.eval_shape(method.init, KEY, p)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), start)
    assert {x.dtype for x in jax.tree.leaves(start.train)} == {jnp.dtype("float32")}
    base = apply_edits(p, start.edits)
    path = "layers/0/mlp/up/kernel"
    bound = paths.get(method.bind(base, start.train, {}, Context()), path)
    q, a, b = loftq.split(paths.get(p, path), "nf4", 2, 2, 64)
    assert q.values.dtype == jnp.uint4
    expected = np.asarray(q.dense(), np.float32) + np.asarray(a @ b)
    np.testing.assert_allclose(np.asarray(bound.dense(), np.float32), expected, rtol=1e-2, atol=1e-3)
    assert len(start.train) == len(start.edits) == 2
    axes = method.axes(tiny.model().axes, start.train)
    assert axes[path] == {"a": ("layers", "embed", None), "b": ("layers", None, "mlp")}


def test_merge():
    m, p = tiny.model(), tiny.params()
    method = registry.build({"name": "loftq", "rank": 2, "targets": TWO})
    start = method.init(KEY, p)
    base = apply_edits(p, start.edits)
    bound = method.bind(base, start.train, {}, Context())
    merged = method.merge(base, start.train, {})
    assert all(operators.is_array(x) for x in paths.flatten(merged).values() if x is not None)
    np.testing.assert_allclose(tiny.outputs(m, merged), tiny.outputs(m, bound), atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "nf5"}, "nf4"),
        ({"iterations": 0}, "at least 1"),
        ({"rank": 17}, "has less"),
        ({"block_size": 0}, "block"),
    ],
)
def test_what_does_not_fit_is_refused(spec, said):
    with pytest.raises(errors.TunejaxError, match=said):
        registry.build({"name": "loftq", **spec}).init(KEY, tiny.params())


def test_after_a_wrapper_it_is_refused():
    with pytest.raises(errors.TargetError, match="put loftq first"):
        registry.build([{"name": "lora", "rank": 2}, {"name": "loftq"}]).init(KEY, tiny.params())
