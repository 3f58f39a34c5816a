"""The scaled parallel adapter against its paper's formula in numpy, at the MLP of tiny models."""

import math

import branches
import jax
import numpy as np
import pytest
import tiny
from branches import DOWN, noisy

from tunejax.core import errors
from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.methods import lora, parallel_adapter

KEY = jax.random.key(0)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / np.sqrt(2))))(x)


def normed(x, scale, bias=None, eps=1e-6):
    x = x - x.mean(-1, keepdims=True) if bias is not None else x
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    return y if bias is None else y + bias


def adapter(x, arrays, act, scale):
    a = {k: np.asarray(v)[0] for k, v in arrays.items()}
    return scale * (act(x @ a["down"] + a["down_bias"]) @ a["up"] + a["up_bias"])


def test_the_formula_beside_a_gated_mlp():
    m, p = tiny.model(), tiny.params()
    method = parallel_adapter.parallel_adapter(width=5, scale=3.0)
    train = noisy(method.init(KEY, p).train)
    plain, both = branches.of(m, p), branches.of(m, method.bind(p, train, {}, Context()))
    np.testing.assert_array_equal(plain["attention"][0], both["attention"][0])
    x = np.asarray(p["embed"]["table"])[tiny.batch()["tokens"]] + plain["attention"][0]
    x = normed(x, np.asarray(p["layers"]["0"]["mlp"]["norm"]["scale"][0]), eps=tiny.LLAMA.norm_eps)
    expected = plain["mlp"][0] + adapter(x, train[DOWN], silu, 3.0)
    np.testing.assert_allclose(both["mlp"][0], expected, rtol=1e-5, atol=1e-5)


def test_the_formula_beside_a_plain_mlp_with_biases():
    m, p = tiny.model(tiny.BERT, "mlm"), tiny.params(tiny.BERT, "mlm")
    method = parallel_adapter.parallel_adapter(width=5)
    train = noisy(method.init(KEY, p).train)
    plain, both = branches.of(m, p), branches.of(m, method.bind(p, train, {}, Context()))
    e = jax.tree.map(np.asarray, {k: p[k] for k in ("embed", "types", "positions", "embed_norm")})
    batch = tiny.batch()
    x = (
        e["embed"]["table"][batch["tokens"]]
        + e["types"]["table"][0]
        + e["positions"]["table"][: batch["tokens"].shape[1]]
    )
    x = normed(x, e["embed_norm"]["scale"], e["embed_norm"]["bias"], tiny.BERT.norm_eps) + plain["attention"][0]
    norm = jax.tree.map(lambda v: np.asarray(v[0]), p["layers"]["0"]["attention"]["norm"])
    x = normed(x, norm["scale"], norm["bias"], tiny.BERT.norm_eps)
    expected = plain["mlp"][0] + adapter(x, train[DOWN], gelu, 4.0)
    seen = batch["segment_ids"] > 0
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


def test_layers_and_wrong_targets():
    method = parallel_adapter.parallel_adapter(width=2, layers="1:")
    assert set(method.init(KEY, tiny.params(cuts=(1,))).train) == {DOWN.replace("0", "1", 1)}
    with pytest.raises(errors.TargetError, match="mlp/down/kernel"):
        parallel_adapter.parallel_adapter("attention/o/kernel").init(KEY, tiny.params())
