"""Several members in one program: each is its own run, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trains

from tunejax.core import errors
from tunejax.methods import registry
from tunejax.models import build
from tunejax.objectives import causal_lm
from tunejax.train import evaluation, many, optimizer, schedule, sharding, state, step

MEMBERS = [(0, 2, 1e-2), (5, 4, 3e-2), (7, 3, 2e-3)]
"""Seed, rank, learning rate."""
STEPS = 4
CHAIN = [
    {"name": "lora", "targets": "attention/{q,v}/kernel", "dropout": 0.2},
    {"name": "full", "targets": "norm/scale"},
]


def method_of(rank, specs=CHAIN):
    first, *rest = specs
    return registry.build([{**first, "rank": rank}, *rest])


def given(factor):
    return {"0:lora": {"b": factor}}


def optimizer_of(rate, name="adamw"):
    made = schedule.make_schedule("linear", rate, total_steps=STEPS + 1, warmup_steps=1)
    return optimizer.make_optimizer(name, made, weight_decay=0.1)


def parts(mesh):
    model = build.build(tiny.LLAMA, head="lm", constrain=sharding.constrainer(mesh))
    return model, causal_lm.make(), jax.tree.map(jnp.array, tiny.params())


def batches(member=None):
    """A batch a step; those of a member, where each has its own."""
    rng = np.random.default_rng(1 if member is None else 2 + member)
    for _ in range(STEPS):
        tokens = rng.integers(1, 31, (4, 9)).astype(np.int32)
        yield {**trains.rows(4, 8), "tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def alone(seed, rank, rate, mesh, rows, name="adamw"):
    """(losses, last state, held-out loss) of one member's own run."""
    model, objective, params = parts(mesh)
    method, tuner = method_of(rank), optimizer_of(rate, name)
    s, base = state.start(model, method, tuner, params, jax.random.key(seed), mesh)
    one = step.make_step(model, method, objective, tuner, mesh=mesh, max_grad_norm=0.5)
    losses = []
    for batch in rows:
        s, metrics = one(s, base, {}, one.put(batch))
        losses.append(float(metrics["loss"]))
    return losses, s, evaluation.evaluate(one, s, base, [trains.rows(4, 8)])["loss"]


def begin(mesh, members=MEMBERS, name="adamw"):
    model, objective, params = parts(mesh)
    method = method_of(max(r for _, r, _ in members))
    own = [method_of(r) for _, r, _ in members]
    largest = max(r for _, r, _ in members)
    shapes = jax.eval_shape(method.init, jax.random.key(0), params)
    factors = [many.factors_of(shapes, given(largest / r)) for _, r, _ in members]
    keys = [jax.random.key(seed) for seed, _, _ in members]
    s, base = many.start(model, method, own, factors, optimizer_of(1.0, name), params, keys, mesh)
    rates = [rate for _, _, rate in members]
    one = many.make_step(model, method, objective, lambda r: optimizer_of(r, name), rates, mesh=mesh, max_grad_norm=0.5)
    return one, s, base, own


def together(mesh, rows, name="adamw"):
    one, s, base, own = begin(mesh, name=name)
    before = jax.tree.map(np.array, base)
    logged = []
    for batch in rows:
        s, metrics = one(s, base, {}, one.put(batch))
        logged.append(jax.device_get(metrics))
    jax.tree.map(np.testing.assert_array_equal, base, before)
    likes = [jax.eval_shape(m.init, jax.random.key(0), tiny.params()) for m in own]
    held_out = evaluation.evaluate(one, s, base, [trains.rows(4, 8)])
    return logged, s, [many.member(s, i, like) for i, like in enumerate(likes)], held_out


def compare(found, expected, i):
    logged, _, members, held_out = found
    losses, last, loss = expected
    np.testing.assert_allclose([m[f"{i}/loss"] for m in logged], losses, atol=1e-5)
    np.testing.assert_allclose(held_out[f"{i}/loss"], loss, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), members[i].train, last.train)
    assert losses[-1] != losses[0]


def test_members_of_other_seeds_ranks_and_rates_equal_their_own_runs():
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = together(mesh, batches())
    for i, member in enumerate(MEMBERS):
        compare(found, alone(*member, mesh, batches()), i)
    means = [np.mean([m[f"{i}/loss"] for i in range(3)]) for m in found[0]]
    np.testing.assert_allclose([m["loss"] for m in found[0]], means, rtol=1e-6)

    padding_is_zero(found[1])


def test_frozen_arrays_carry_a_scale_too(monkeypatch):
    """PiSSA subtracts its start, which lies in ``state``."""
    monkeypatch.setattr(
        "test_many.method_of",
        lambda rank: registry.build({"name": "pissa", "targets": "attention/q/kernel", "alpha": 6.0, "rank": rank}),
    )
    monkeypatch.setattr("test_many.given", lambda factor: {"": {"b": factor, "b0": factor}})
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = together(mesh, batches())
    for i, member in enumerate(MEMBERS[:2]):
        compare(found, alone(*member, mesh, batches()), i)


def test_padding_stays_zero_without_adams_denominator():
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    padding_is_zero(together(mesh, batches(), "lion")[1])


def padding_is_zero(s):
    for arrays in s.train["0:lora"].values():
        assert jnp.abs(arrays["a"][0, ..., :2]).min() > 0
        assert jnp.abs(arrays["b"][0, ..., :2, :]).min() > 0
        assert jnp.abs(arrays["a"][0, ..., 2:]).max() == 0
        assert jnp.abs(arrays["b"][0, ..., 2:, :]).max() == 0


def test_each_member_may_have_its_own_rows_on_a_mesh():
    mesh = sharding.make_mesh(2, 2, 2)
    rows = [{k: np.stack([b[k] for b in each]) for k in each[0]} for each in zip(*map(batches, range(3)), strict=True)]
    found = together(mesh, rows)
    one = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for i, member in enumerate(MEMBERS):
        compare(found, alone(*member, one, batches(i)), i)


def test_a_member_that_diverges_stands_still_and_stops_nobody():
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    one, s, base, _ = begin(mesh)
    rows = [{k: np.stack([b[k]] * 3) for k in b} for b in batches()]
    for batch in rows:
        batch["loss_weights"][1] = np.nan
    first = jax.tree.map(lambda x: np.array(x), s.train)
    for batch in rows:
        s, metrics = one(s, base, {}, one.put(batch))
    far = jax.tree.map(lambda x, y: np.abs(x - y).reshape(3, -1).max(1), s.train, first)
    moved = np.max(jax.tree.leaves(far), axis=0)
    assert moved[1] == 0
    assert min(moved[0], moved[2]) > 0
    assert s.state["nonfinite"].tolist() == [[0, 0], [STEPS, STEPS], [0, 0]]
    assert float(metrics["nonfinite"]) == 0
    assert np.isfinite(float(metrics["loss"]))


def test_metrics_of_a_member_go_by_their_own_names():
    logged = {"step": 3, "loss": 1.0, "0/loss": 2.0, "11/loss": 3.0, "eval_11/loss": 4.0, "eval_1/loss": 5.0, "lr": 1}
    assert many.of_member(logged, 11) == {"step": 3, "loss": 3.0, "eval_loss": 4.0}


def test_members_that_do_not_fit_are_refused():
    a = {"x": {"a": jnp.zeros((2, 3))}}
    with pytest.raises(errors.ConfigError, match=r"shape \(2, 3\), another \(2, 2\)"):
        many.padded(a, {"x": {"a": jnp.zeros((2, 2))}})
    with pytest.raises(errors.ConfigError, match="arrays of the same names"):
        many.padded(a, {"y": {"a": jnp.zeros((2, 3))}})
