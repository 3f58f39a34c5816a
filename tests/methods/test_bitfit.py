import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import errors, paths
from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.methods import bitfit, registry

KEY = jax.random.key(0)


def test_every_bias_of_a_model_that_has_them():
    p = tiny.params(tiny.BERT, "classification")
    start = bitfit.bitfit().init(KEY, p)
    there = {k for k, x in paths.flatten(p).items() if k.endswith("/bias") and x is not None}
    assert set(start.train) == set(start.edits) == there
    assert "embed_norm/bias" in there
    assert "layers/0/mlp/norm/bias" in there


def test_empty_slots_are_filled_with_zeros():
    m, p = tiny.model(), tiny.params()
    method = bitfit.bitfit()
    start = method.init(KEY, p)
    assert not start.edits
    sites = ("attention/q", "attention/k", "attention/v", "attention/o", "mlp/gate", "mlp/up", "mlp/down")
    assert set(start.train) == {f"layers/0/{s}/bias" for s in sites}
    assert start.train["layers/0/attention/k/bias"].shape == (3, 8)
    before = tiny.outputs(m, p)
    np.testing.assert_array_equal(before, tiny.outputs(m, method.bind(p, start.train, {}, Context())))
    moved = jax.tree.map(lambda x: x + 0.1, start.train)
    after = tiny.outputs(m, method.merge(p, moved, {}))
    assert np.abs(after - before).max() > 1e-2


def test_targets_and_layers():
    method = bitfit.bitfit("attention/{q,v}/bias", layers="-1:")
    assert method.cuts(3) == (2,)
    start = method.init(KEY, tiny.params(cuts=(2,)))
    assert set(start.train) == {"layers/1/attention/q/bias", "layers/1/attention/v/bias"}


def test_some_may_be_taken_away():
    p = tiny.params(tiny.BERT, "classification")
    every, some = (bitfit.bitfit(t).init(KEY, p).train for t in ("bias", ["bias", "!{pooler,classifier}/**"]))
    assert set(every) - set(some) == {"pooler/bias", "classifier/bias"}


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["attention/q/bias", "atention/k/bias"], "'atention/k/bias' matches no bias. Did you mean .*attention/k/bias"),
        (["bias", "!atention/**"], "'!atention/[*][*]' matches no bias"),
        (["bias", "!mpl/up/bias"], "'!mpl/up/bias' matches no bias. Did you mean .*mlp/up/bias"),
        (["mlp/**", "norm/bias"], "'norm/bias' matches no bias"),
        (["bias", "!bias"], "take away all that they match"),
    ],
)
def test_every_pattern_matches_a_bias(targets, said):
    """Norms without a bias are given none."""
    with pytest.raises(errors.TargetError, match=said):
        bitfit.bitfit(targets).init(KEY, tiny.params())


def test_nothing_to_train_is_an_error():
    with pytest.raises(errors.TargetError, match="fill_empty: true"):
        bitfit.bitfit(fill_empty=False).init(KEY, tiny.params())
    with pytest.raises(errors.TargetError, match="Did you mean"):
        bitfit.bitfit("attention/qq/bias").init(KEY, tiny.params())


def test_axes_shapes_and_types():
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params(tiny.BERT, "mlm"))
    method = bitfit.bitfit()
    train = jax.eval_shape(method.init, KEY, p).train
    assert {x.dtype for x in train.values()} == {jnp.dtype("float32")}
    axes = method.axes(tiny.model(tiny.BERT, "mlm").axes, train)
    assert axes["layers/0/attention/q/bias"] == ("layers", "heads")
    methods.apply_edits(p, method.init(KEY, p).edits)


@pytest.mark.parametrize("before", [{"name": "parallel_adapter", "width": 4}, {"name": "mam", "length": 2, "width": 4}])
def test_a_kernel_that_was_made_wider_has_a_bias_of_the_models_width(before):
    m, p = tiny.model(), tiny.params()
    method = registry.build([before, {"name": "bitfit"}])
    start = method.init(KEY, p)
    *_, last = start.train
    assert start.train[last]["layers/0/mlp/gate/bias"].shape == (3, 24)
    without = registry.build(before)
    alone = without.init(KEY, p)
    expected = tiny.outputs(m, without.bind(p, alone.train, alone.state, Context()))
    np.testing.assert_allclose(
        tiny.outputs(m, method.bind(p, start.train, start.state, Context())), expected, atol=1e-6
    )
