"""A base in few bits against plain numpy, and what is tuned above it against the same base decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trains

from tunejax.core import errors, operators, paths, quantized
from tunejax.core.method import Context, apply_edits
from tunejax.methods import registry, report
from tunejax.models import build
from tunejax.objectives import causal_lm
from tunejax.train import optimizer, sharding, state, step

NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
"""Appendix E of the paper."""


def rounded(kind, w, block):
    """(values, where two are as near): blocks of inputs of one output over their scale, rounded, multiplied back."""
    out, ties = np.zeros_like(w), np.zeros(w.shape, bool)
    levels = {"nf4": NF4, "int8": np.arange(-128, 128) / 127.5, "int4": np.arange(-8, 8) / 7.5}[kind]
    for i in range(0, w.shape[0], block):
        part = w[i : i + block]
        scale = np.abs(part).max(axis=0)
        apart = np.abs((part / scale)[..., None] - levels)
        out[i : i + block] = levels[apart.argmin(-1)] * scale
        nearest = np.sort(apart, axis=-1)
        ties[i : i + block] = nearest[..., 1] - nearest[..., 0] < 1e-5
    return out, ties


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize(("fan_in", "block"), [(128, 64), (24, 24), (86, 43)])
def test_values_are_those_of_the_formula(kind, fan_in, block):
    w = np.random.default_rng(0).standard_normal((3, fan_in, 5)).astype(np.float32)
    made = quantized.encoded(kind, jnp.asarray(w), 64)
    assert made.scales.shape == (3, fan_in // block, 5)
    assert made.shape == w.shape
    for layer in range(3):
        expected, ties = rounded(kind, w[layer], block)
        found = np.asarray(made.dense()[layer])
        assert ties.mean() < 0.05
        np.testing.assert_allclose(found[~ties], expected[~ties], atol=1e-5)
        np.testing.assert_allclose(np.abs(found - w[layer])[ties], np.abs(expected - w[layer])[ties], atol=1e-4)


def qlora(kind="nf4"):
    return registry.build([{"name": "quantize", "kind": kind}, {"name": "lora", "rank": 2}])


def started(kind):
    """(the method, base of operators, the same base decoded, a random adapter)."""
    method, params = qlora(kind), tiny.params()
    begun = method.init(jax.random.key(0), params)
    base = apply_edits(params, begun.edits)
    rng = np.random.default_rng(1)
    train = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), begun.train)
    return method, base, operators.densify(base), train


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_logits_and_gradients_are_those_above_the_decoded_base(kind):
    method, base, decoded, train = started(kind)
    model = tiny.model()

    def loss(train, base):
        bound = method.bind(base, train, {"0:quantize": {}, "1:lora": {}}, Context())
        out = model.logits(model.head(bound), model.hidden(bound, tiny.batch())[0])
        return jnp.sum(out**2), out

    (_, ours), mine = jax.value_and_grad(loss, has_aux=True)(train, base)
    (_, plain), theirs = jax.value_and_grad(loss, has_aux=True)(train, decoded)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
    merged = method.merge(base, train, {"0:quantize": {}, "1:lora": {}})
    np.testing.assert_allclose(tiny.outputs(model, merged), ours, atol=1e-4)


def test_no_decoded_kernel_waits_for_the_backward_pass():
    made = quantized.encoded("nf4", jnp.ones((64, 48)), 64)
    _, pull = jax.vjp(lambda x: made(x), jnp.ones((4, 64)))
    kept = [x for x in jax.tree.leaves(pull) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.size <= 64 for x in kept)
    assert made.values.dtype == jnp.uint4


def test_the_compiled_step_takes_half_a_byte_a_parameter():
    method = qlora()
    model = build.build(tiny.LLAMA, head="lm")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    tuner = optimizer.make_optimizer("sgd", 1e-2)
    params = jax.tree.map(jnp.array, tiny.params())
    s, base = state.start(model, method, tuner, params, jax.random.key(0), mesh)
    one = step.make_step(model, method, causal_lm.make(), tuner, mesh=mesh)
    batch = one.put(trains.rows())
    found = one.lower(s, base, {}, batch).compile().memory_analysis().argument_size_in_bytes
    quantised = [x for x in paths.flatten(base).values() if isinstance(x, quantized.Quantized)]
    assert len(quantised) == 7
    kernels = sum(x.values.size for x in quantised)
    scales = sum(x.scales.nbytes for x in quantised)
    plain = sum(x.nbytes for x in paths.flatten(base).values() if operators.is_array(x))
    rest = sum(x.nbytes for x in jax.tree.leaves((s.train, s.opt_state, batch)))
    assert found <= 0.6 * kernels + scales + plain + rest + 256


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "nf5"}, "nf4"),
        ({"block_size": 0}, "block_size"),
        ({"targets": "norm/scale"}, "kernel"),
        ({"targets": "attention/x/kernel"}, "attention"),
    ],
)
def test_what_does_not_fit_is_refused(spec, said):
    with pytest.raises(errors.TunejaxError, match=said):
        registry.build({"name": "quantize", **spec}).init(jax.random.key(0), tiny.params())


def test_after_a_wrapper_it_is_refused():
    method = registry.build([{"name": "lora", "rank": 2}, {"name": "quantize"}])
    with pytest.raises(errors.TargetError, match="put quantize first"):
        method.init(jax.random.key(0), tiny.params())


def test_the_report_says_what_is_rewritten():
    method, params = qlora(), tiny.params()
    first, second = report.describe(method, params, method.init(jax.random.key(0), params)).entries
    assert (first.method, first.leaves, first.parameters) == ("quantize", 7, 0)
    assert (second.method, second.leaves) == ("lora", 7)
