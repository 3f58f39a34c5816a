"""The scaled parallel adapter against its paper's formula in numpy, at the MLP of tiny models."""

import math

import branches
import jax
import numpy as np
import pytest
import tiny
from branches import DOWN, OUT, noisy

from tunejax.core import errors
from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.methods import lora, parallel_adapter

KEY = jax.random.key(0)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / np.sqrt(2))))(x)


def adapter(x, arrays, act, scale):
    a = {k: np.asarray(v)[0] for k, v in arrays.items()}
    return scale * (act(x @ a["down"] + a["down_bias"]) @ a["up"] + a["up_bias"])


def test_the_formula_beside_a_gated_mlp():
    m, p = tiny.model(), tiny.params()
    method = parallel_adapter.parallel_adapter(width=5, scale=3.0)
    train = noisy(method.init(KEY, p).train)
    plain, both = branches.of(m, p), branches.of(m, method.bind(p, train, {}, Context()))
    np.testing.assert_array_equal(plain["attention"][0], both["attention"][0])
    x = branches.block_norm(p, tiny.LLAMA, "mlp", branches.entrance(p, tiny.LLAMA) + plain["attention"][0])
    expected = plain["mlp"][0] + adapter(x, train[DOWN], silu, 3.0)
    np.testing.assert_allclose(both["mlp"][0], expected, rtol=1e-5, atol=1e-5)


def test_the_formula_beside_a_plain_mlp_with_biases():
    m, p = tiny.model(tiny.BERT, "mlm"), tiny.params(tiny.BERT, "mlm")
    method = parallel_adapter.parallel_adapter(width=5)
    train = noisy(method.init(KEY, p).train)
    plain, both = branches.of(m, p), branches.of(m, method.bind(p, train, {}, Context()))
    x = branches.block_norm(p, tiny.BERT, "attention", branches.entrance(p, tiny.BERT) + plain["attention"][0])
    expected = plain["mlp"][0] + adapter(x, train[DOWN], gelu, 4.0)
    seen = tiny.batch()["segment_ids"] > 0
    np.testing.assert_allclose(both["mlp"][0][seen], expected[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "head"), [(tiny.LLAMA, "lm"), (tiny.BERT, "mlm")])
def test_identity_at_the_start_and_no_kernel(config, head):
    m, p = tiny.model(config, head), tiny.params(config, head)
    method = parallel_adapter.parallel_adapter(reduction_factor=4)
    start = method.init(KEY, p)
    assert start.train[DOWN]["down"].shape == (3, 16, 4)
    bound = method.bind(p, start.train, {}, Context())
    assert bound["layers"]["0"]["mlp"]["up"]["kernel"].shape == (3, 16, 28)
    assert bound["layers"]["0"]["mlp"]["down"]["kernel"].shape == (3, 28, 16)
    np.testing.assert_allclose(tiny.outputs(m, p), tiny.outputs(m, bound), atol=1e-6)
    with pytest.raises(errors.NotLinear, match=DOWN):
        method.merge(p, start.train, {})


def test_other_methods_stand_before_and_after():
    m, p = tiny.model(), tiny.params()
    wide = parallel_adapter.parallel_adapter(width=3)
    low = lora.lora("mlp/{gate,up,down}/kernel", rank=2)
    for parts in ([wide, low], [low, wide]):
        method = methods.chain(*parts)
        start = method.init(KEY, p)
        np.testing.assert_allclose(
            tiny.outputs(m, p), tiny.outputs(m, method.bind(p, start.train, start.state, Context())), atol=1e-6
        )


def test_what_reads_the_residual_has_an_activation_of_its_own():
    m, p = tiny.model(), tiny.params()
    method = parallel_adapter.parallel_adapter(width=5, scale=3.0, reads="residual")
    train = noisy(method.init(KEY, p).train)
    plain, both = branches.of(m, p), branches.of(m, method.bind(p, train, {}, Context()))
    x = branches.entrance(p, tiny.LLAMA) + plain["attention"][0]
    expected = plain["hidden"][0] + adapter(x, train[DOWN], lambda v: np.maximum(v, 0), 3.0)
    np.testing.assert_allclose(both["hidden"][0], expected, rtol=1e-5, atol=1e-5)
    beside = parallel_adapter.parallel_adapter("attention/o/kernel", width=2, reads="residual", activation="tanh")
    assert set(beside.init(KEY, p).train) == {OUT}
    for bad, says in (({"activation": "tanh"}, "reads: residual"), ({"reads": "sum"}, "residual"),
                      ({"reads": "residual", "activation": "tan"}, "tanh")):  # fmt: skip
        with pytest.raises(errors.ConfigError, match=says):
            parallel_adapter.parallel_adapter(**bad)


def test_layers_and_wrong_targets():
    method = parallel_adapter.parallel_adapter(width=2, layers="1:")
    assert set(method.init(KEY, tiny.params(cuts=(1,))).train) == {DOWN.replace("0", "1", 1)}
    with pytest.raises(errors.TargetError, match="mlp/down/kernel"):
        parallel_adapter.parallel_adapter("attention/o/kernel").init(KEY, tiny.params())
