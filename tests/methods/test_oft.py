"""OFT and BOFT against HF PEFT; butterflies of several factors against matrices built by PEFT's own permutation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_pair
import pytest
import tiny

from tunejax.core import errors
from tunejax.methods import oft, registry

torch = peft_pair.torch


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {}),
        ("llama", {}),
        ("llama", {"use_cayley_neumann": False}),
        ("llama", {"num_cayley_neumann_terms": 4, "block_share": True}),
    ],
)
def test_oft_equals_peft(family, options, tmp_path):
    options = {"oft_block_size": 8, **options}
    config = functools.partial(peft_pair.peft.OFTConfig, **options)
    peft_pair.check(
        family, tmp_path, config, {"name": "oft", **options}, lambda m, read: {"skew": read(m.oft_R["default"].weight)}
    )


@pytest.mark.filterwarnings("ignore")  # PEFT says that it has no CUDA kernel for several factors
@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_boft_equals_peft(family, tmp_path):
    config = functools.partial(peft_pair.peft.BOFTConfig, boft_block_size=4)
    peft_pair.check(
        family,
        tmp_path,
        config,
        {"name": "boft", "boft_block_size": 4},
        lambda m, read: {"r": read(m.boft_R["default"]), "s": read(m.boft_s["default"])[:, 0]},
    )


def test_butterflies_equal_pefts_matrices():
    from peft.tuners.boft.layer import BOFTLayer

    size, factors, block = 16, 3, 4
    raw = 0.3 * np.random.default_rng(0).standard_normal((factors, size // block, block, block)).astype(np.float32)
    maker = BOFTLayer(torch.nn.Linear(size, 7))
    whole = np.eye(size, dtype=np.float32)
    for i in range(factors):
        order = maker.block_butterfly_perm(size, size // block // 2**i, block // 2, factors - 1)
        p = maker.perm2mat(order).numpy()
        blocks = torch.block_diag(*maker.cayley_batch(torch.tensor(raw[i]))).numpy()
        whole = p @ blocks @ p.T @ whole
    np.testing.assert_allclose(whole @ whole.T, np.eye(size), atol=1e-5)
    assert (np.abs(whole) > 1e-6).all()

    rng = np.random.default_rng(1)
    w, s, x, bias = (rng.standard_normal(n).astype(np.float32) for n in ((size, 7), 7, (2, 3, size), 7))
    method = oft.boft("w/kernel", block_size=block, factors=factors)
    train = {"w/kernel": {"r": jnp.asarray(raw), "s": jnp.asarray(s)}}
    op = method.bind({"w": {"kernel": jnp.asarray(w)}}, train, {}, oft.Context())["w"]["kernel"]
    np.testing.assert_allclose(op(jnp.asarray(x), jnp.asarray(bias)), x @ whole @ w * s + bias, atol=2e-5)
    np.testing.assert_allclose(op.dense(), whole @ w * s, atol=1e-5)


def test_a_bias_that_a_method_before_scales_stays_scaled():
    params = {"w": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}}
    method = registry.build([{"name": "ia3", "targets": "w/kernel"}, {"name": "boft", "targets": "w/kernel"}])
    start = method.init(jax.random.key(0), params)
    ia3, boft = start.train
    train = {**start.train, ia3: jax.tree.map(lambda x: 2 * x, start.train[ia3])}
    state = {ia3: {}, boft: {}}
    bound, merged = method.bind(params, train, state, oft.Context())["w"], method.merge(params, train, state)["w"]
    np.testing.assert_allclose(bound["kernel"](jnp.zeros((1, 4)), bound["bias"]), np.full((1, 4), 2.0))
    np.testing.assert_allclose(merged["bias"], np.full(4, 2.0))


@pytest.mark.parametrize(
    "before",
    [{"name": "houlsby", "width": 4}, {"name": "parallel_adapter", "width": 4}, {"name": "loreft", "rank": 2}],
    ids=lambda spec: spec["name"],
)
def test_what_stands_before_boft_still_reads_its_bias(before):
    m, p = tiny.model(tiny.BERT, "mlm"), tiny.params(tiny.BERT, "mlm")
    first, second = registry.build(before), registry.build({"name": "boft"})
    start, rng = first.init(jax.random.key(0), p), np.random.default_rng(3)
    train = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(rng.standard_normal(x.shape), jnp.float32), start.train)
    bound = first.bind(p, train, start.state, oft.Context())
    fresh = second.init(jax.random.key(1), bound)
    both = second.bind(bound, fresh.train, fresh.state, oft.Context())
    np.testing.assert_allclose(tiny.outputs(m, both), tiny.outputs(m, bound), atol=1e-5)


def test_the_exact_cayley_transform_is_orthogonal():
    raw = np.random.default_rng(0).standard_normal((2, 5, 5)).astype(np.float32)
    r = oft.cayley(jnp.asarray(raw - raw.swapaxes(1, 2)))
    np.testing.assert_allclose(r @ r.swapaxes(1, 2), np.broadcast_to(np.eye(5), (2, 5, 5)), atol=1e-5)
    small = jnp.asarray(0.01 * (raw - raw.swapaxes(1, 2)))
    np.testing.assert_allclose(oft.cayley_series(small, 5), oft.cayley(-small), atol=1e-5)


@pytest.mark.parametrize("method", [oft.oft(block_size=32), oft.boft(block_size=5), oft.boft(block_size=8, factors=3)])
def test_blocks_that_do_not_divide_are_refused(method):
    with pytest.raises(errors.TargetError, match=r"do not divide a kernel's input of (16|24); the nearest"):
        method.init(jax.random.key(0), tiny.params())


@pytest.mark.parametrize(("make", "bad"), [(oft.oft, {"terms": 3}), (oft.boft, {"block_size": 3, "factors": 2})])
def test_bad_arguments(make, bad):
    with pytest.raises(errors.ConfigError, match=next(iter(bad))):
        make(**bad)
