"""Masks over units: what the operator lets through, where masks are put, and what the gradients of probes are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import masked, operators, paths, units

RNG = np.random.default_rng(0)


def test_masked_is_its_dense_kernel():
    kernel, bias, x = (jnp.asarray(RNG.standard_normal(s), jnp.float32) for s in ((2, 4, 3), (2, 3), (2, 5, 4)))
    op = masked.Masked(kernel, in_mask=jnp.array([[1.0, 0, 1, 0]] * 2), out_mask=jnp.array([[1.0, 1, 0]] * 2))
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], op)
        expected = np.asarray(x[i] * one.in_mask) @ np.asarray(kernel[i]) + np.asarray(bias[i])
        np.testing.assert_allclose(one(x[i], bias[i]), expected * np.asarray(one.out_mask), rtol=1e-5)
        merged = x[i] @ op.dense()[i] + operators.dense_bias(op, bias)[i]
        np.testing.assert_allclose(one(x[i], bias[i]), merged, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_probe_is_the_sum_of_squares():
    kernel, x = (jnp.asarray(RNG.standard_normal(s), jnp.float32) for s in ((4, 3), (2, 5, 4)))

    def loss(x, seen):
        return jnp.sum(masked.Masked(kernel, in_mask=jnp.array([0.0, 1, 1, 1]), in_seen=seen)(x) ** 2)

    grad_x, grad = jax.jit(jax.grad(loss, (0, 1)))(x, jnp.zeros(4))
    np.testing.assert_allclose(grad, np.square(np.asarray(x)).sum((0, 1)), rtol=1e-5)
    plain = jax.grad(lambda x: loss(x, None))(x)
    np.testing.assert_array_equal(grad_x, plain)


@pytest.mark.parametrize(("config", "head"), [(tiny.LLAMA, "lm"), (tiny.BERT, "mlm"), (tiny.BERT, "classification")])
def test_ones_change_nothing_and_every_entry_of_the_model_is_counted(config, head):
    m, p = tiny.model(config, head), tiny.params(config, head)
    sizes = units.sizes(p, config.num_kv_heads)
    assert sizes == {"heads": config.num_kv_heads, "mlp": 24, "depth": 3, "hidden": 16}
    ones = {k: jnp.ones((units.rows(p, k), n)) for k, n in sizes.items()}
    np.testing.assert_allclose(tiny.outputs(m, masked.put(p, ones)), tiny.outputs(m, p), atol=1e-6)
    every = sum(x.size for x in jax.tree.leaves(p))
    assert units.parameters(p, {}, sizes) == units.parameters(p, sizes, sizes) == every
    one = 3 * (2 * 16 + 1) if config.kind == "encoder" else 3 * 3 * 16  # up, its bias and down; gate, up and down
    assert every - units.parameters(p, {"mlp": 23}, sizes) == one


def test_squares_of_each_units_parameters():
    p = tiny.params(tiny.QWEN3, "lm", (1,))
    flat = {k: np.asarray(x) for k, x in paths.flatten(p).items() if x is not None}
    whole = {k.split("/", 2)[2]: np.concatenate([x, flat[k.replace("/0/", "/1/", 1)]])
             for k, x in flat.items() if k.startswith("layers/0")}  # fmt: skip
    q, k, v, o = (whole[f"attention/{n}/kernel"] ** 2 for n in "qkvo")
    heads = q.reshape(3, 16, 2, 8).sum((1, 3)) + o.reshape(3, 2, 8, 16).sum((2, 3))
    heads += sum(x.reshape(3, 16, 2, 4).sum((1, 3)) for x in (k, v))
    np.testing.assert_allclose(units.squares(p, "heads", 2), heads, rtol=1e-5)
    gate, up, down = (whole[f"mlp/{n}/kernel"] ** 2 for n in ("gate", "up", "down"))
    np.testing.assert_allclose(units.squares(p, "mlp", 24), gate.sum(1) + up.sum(1) + down.sum(2), rtol=1e-5)
    np.testing.assert_allclose(units.squares(p, "depth", 3), [(o.sum((1, 2)) + down.sum((1, 2)))], rtol=1e-5)
    hidden = sum(x.sum((0, 1)) for x in (o, down)) + sum(x.sum((0, 2)) for x in (q, k, v, gate, up))
    hidden += sum((whole[f"{n}/norm/scale"] ** 2).sum(0) for n in ("attention", "mlp"))
    hidden += flat["norm/scale"] ** 2 + (flat["embed/table"] ** 2).sum(0)
    np.testing.assert_allclose(units.squares(p, "hidden", 16), hidden[None], rtol=1e-5)


def test_a_closed_gate_is_the_identity_where_norms_come_last():
    m, p = tiny.model(tiny.BERT, "mlm"), tiny.params(tiny.BERT, "mlm")
    closed = masked.put(p, {"depth": jnp.zeros((1, 3))})
    hidden = m.hidden(closed, tiny.batch())[0]
    first = p["embed"]["table"][tiny.batch()["tokens"]] + p["positions"]["table"][: hidden.shape[1]]
    x = np.asarray(first + p["types"]["table"][0])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + tiny.BERT.norm_eps)
    x = x * np.asarray(p["embed_norm"]["scale"]) + np.asarray(p["embed_norm"]["bias"])
    real = tiny.batch()["segment_ids"] > 0
    np.testing.assert_allclose(np.asarray(hidden)[real], x[real], atol=1e-5)
