"""The step: accumulation, meshes, what is differentiated, what is held, and what a bad batch does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from tunejax.core import method as method_lib
from tunejax.objectives import causal_lm
from tunejax.train import sharding, state, step


def mesh_of(data=1, fsdp=1, tensor=1):
    return sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


def begin(mesh, method=None, optimizer=None, model=None, **kw):
    model = model or toy.model(constrain=sharding.constrainer(mesh))
    method, optimizer = method or toy.full(), optimizer or optax.adam(1e-2)
    s, base = state.start(model, method, optimizer, model.init(jax.random.key(1)), jax.random.key(0), mesh)
    return s, base, step.make_step(model, method, causal_lm.make(chunk_size=5), optimizer, mesh=mesh, **kw)


def run(mesh, steps=20, rows=8, **kw):
    s, base, one = begin(mesh, **kw)
    losses = []
    for i in range(steps):
        s, metrics = one(s, base, {}, one.put(toy.batch(i, rows)))
        losses.append(metrics["loss"])
    return np.array(jax.device_get(losses)), s


def close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol), a, b)


def test_accumulated_ragged_batches_equal_one_big_batch():
    whole_losses, whole = run(mesh_of(), 3, rows=8, max_grad_norm=0.5, optimizer=optax.sgd(0.5))
    part_losses, part = run(mesh_of(), 3, rows=8, max_grad_norm=0.5, optimizer=optax.sgd(0.5), accumulate=4)
    np.testing.assert_allclose(part_losses, whole_losses, atol=1e-6)
    close(part.train, whole.train, 1e-6)


@pytest.fixture(scope="module")
def one_device():
    return {name: run(mesh_of(), method=m)[0] for name, m in (("full", toy.full()), ("lowrank", toy.low_rank()))}


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("name", ["full", "lowrank"])
def test_eight_devices_give_the_losses_of_one(one_device, shape, name):
    losses, s = run(mesh_of(*shape), method=toy.full() if name == "full" else toy.low_rank())
    np.testing.assert_allclose(losses, one_device[name], atol=1e-5)
    assert losses[-1] < losses[0]
    if shape != (8, 1, 1):
        for tree in (s.train, s.opt_state):
            assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(tree))


def test_accumulation_on_a_mesh():
    losses, _ = run(mesh_of(2, 2, 1), 3, rows=16, accumulate=2)
    want, _ = run(mesh_of(), 3, rows=16)
    np.testing.assert_allclose(losses, want, atol=1e-6)


def test_frozen_leaves_have_no_optimiser_state_and_stay_bit_identical():
    s, base, one = begin(mesh_of(), method=toy.low_rank())
    before = jax.device_get(base)
    train = {x.shape for x in jax.tree.leaves(s.train)}
    assert {x.shape for x in jax.tree.leaves(s.opt_state)} <= train | {()}
    assert state.count(s.opt_state) == 2 * state.count(s.train) + 1
    for i in range(3):
        s, _ = one(s, base, {}, one.put(toy.batch(i)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(base), before)


def test_full_tuning_holds_the_weights_once():
    model = toy.model()
    params = model.init(jax.random.key(1))
    count = state.count(params)
    s, base, one = begin(mesh_of())
    assert jax.tree.leaves(base) == []
    assert state.count(s.train) == count
    memory = one.lower(s, base, {}, one.put(toy.batch(0))).compile().memory_analysis()
    arguments = memory.argument_size_in_bytes
    assert arguments < 4 * 3 * count + 4 * 8 * 12 * 5 + 1024
    assert memory.alias_size_in_bytes >= 4 * 3 * count


def test_the_base_of_partial_tuning_has_holes():
    s, base, _ = begin(mesh_of(), method=toy.full("norm/*"))
    assert base["layers"]["0"]["mlp"]["norm"]["scale"] is None
    assert list(s.train) == ["layers/0/mlp/norm/scale"]


def test_a_frozen_kernel_has_no_gradient_in_the_program():
    def flops(method):
        s, base, one = begin(mesh_of(), method=method)
        return one.lower(s, base, {}, one.put(toy.batch(0, 64))).compile().cost_analysis()["flops"]

    assert flops(toy.full("layers/0/mlp/norm/scale")) < 0.8 * flops(toy.full())


def test_a_bad_batch_is_skipped_and_counted():
    s, base, one = begin(mesh_of())
    s, _ = one(s, base, {}, one.put(toy.batch(0)))
    before = jax.device_get((s.train, s.opt_state))
    bad = toy.batch(1)
    bad["loss_weights"] = bad["loss_weights"] * np.float32(np.nan)
    for in_a_row in (1, 2):
        s, metrics = one(s, base, {}, one.put(bad))
        assert float(metrics["nonfinite"]) == in_a_row
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((s.train, s.opt_state)), before)
    s, metrics = one(s, base, {}, one.put(toy.batch(2)))
    assert [int(x) for x in s.nonfinite] == [0, 2]
    assert int(s.step) == 4
    assert np.isfinite(float(metrics["loss"]))


def test_penalty_is_scaled_by_weight_and_update_sees_the_new_train():
    plain = toy.full()
    decayed = plain._replace(
        penalty=lambda train, s, ctx: 0.1 * sum(jnp.sum(x**2) for x in jax.tree.leaves(train)),
        init=lambda key, params: plain.init(key, params)._replace(state={"seen": jnp.zeros(())}),
        update=lambda train, s, grads, ctx: {"seen": s["seen"] + jnp.sum(train["head/kernel"])},
    )
    _, s = run(mesh_of(), 2, method=decayed, optimizer=optax.sgd(0.1))
    _, parts = run(mesh_of(), 2, method=decayed, optimizer=optax.sgd(0.1), accumulate=4)
    close(s.train, parts.train, 1e-6)
    _, undecayed = run(mesh_of(), 2, method=plain, optimizer=optax.sgd(0.1))
    norm = lambda tree: float(optax.tree.norm(tree))  # noqa: E731
    assert norm(s.train) < norm(undecayed.train)
    assert float(s.state["seen"]) != 0


def test_bfloat16_compute_keeps_float32_masters():
    mesh = mesh_of()
    losses, s = run(mesh, 5, model=toy.model(jnp.bfloat16))
    want, _ = run(mesh, 5)
    assert {x.dtype for x in jax.tree.leaves(s.train)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses, want, atol=0.03)
    assert not np.array_equal(losses, want)


def test_each_step_and_micro_batch_draws_its_own_key():
    seen = []
    plain = toy.full()

    def bind(params, train, s, ctx):
        seen.append(ctx.key is not None)
        noise = jax.random.normal(ctx.key, ()) if ctx.train else 0.0
        return plain.bind(params, {p: x * (1 + 0.1 * noise) for p, x in train.items()}, s, ctx)

    noisy = method_lib.method("noisy", plain.init, bind)
    first, _ = run(mesh_of(), 2, method=noisy, optimizer=optax.sgd(0.0))
    again, _ = run(mesh_of(), 2, method=noisy, optimizer=optax.sgd(0.0))
    still, _ = run(mesh_of(), 2, optimizer=optax.sgd(0.0))
    np.testing.assert_array_equal(first, again)
    assert all(seen)
    assert not np.allclose(first, still)


def test_evaluate_sums_and_counts_accuracy():
    s, base, one = begin(mesh_of())
    sums = jax.device_get(one.evaluate(s, base, {}, one.put(toy.batch(0))))
    assert set(sums) == {"loss", "accuracy"}
    assert sums["loss"][1] == sums["accuracy"][1] == toy.batch(0)["loss_weights"].sum()
    _, metrics = one(s, base, {}, one.put(toy.batch(0)))
    np.testing.assert_allclose(metrics["loss"], sums["loss"][0] / sums["loss"][1], rtol=1e-6)


def test_the_step_is_traced_once():
    plain, traced = toy.low_rank(), []
    method = plain._replace(bind=lambda *args: traced.append(1) or plain.bind(*args))
    s, base, one = begin(mesh_of(2, 2, 2), method=method)
    counts = []
    for i in range(3):
        s, _ = one(s, base, {}, one.put(toy.batch(i)))
        one.evaluate(s, base, {}, one.put(toy.batch(i)))
        counts.append(len(traced))
    assert counts[0] == counts[2]


def test_objectives_may_have_frozen_parameters():
    """A teacher's parameters go in as arguments: no constant of the program."""
    mesh, model = mesh_of(), toy.model()
    plain = causal_lm.make()

    def loss(model, params, frozen, batch, ctx):
        mine, weight, metrics = plain.loss(model, params, {}, batch, ctx)
        theirs, _, _ = plain.loss(model, frozen, {}, batch, ctx)
        return mine + theirs, weight, {"teacher": theirs, "rows": (jnp.sum(weight), 2.0), **metrics}

    teacher = model.init(jax.random.key(5))
    optimizer = optax.sgd(0.1)
    s, base = state.start(model, toy.full(), optimizer, model.init(jax.random.key(1)), jax.random.key(0), mesh)
    one = step.make_step(
        model, toy.full(), plain._replace(frozen=teacher, loss=loss), optimizer, mesh=mesh, accumulate=2
    )
    first = jax.device_get(one.evaluate(s, base, teacher, one.put(toy.batch(0))))
    s, metrics = one(s, base, teacher, one.put(toy.batch(0)))
    np.testing.assert_allclose(metrics["teacher"], first["teacher"][0] / first["teacher"][1], rtol=1e-5)
    np.testing.assert_allclose(metrics["rows"], first["rows"][0] / 4.0, rtol=1e-6)
    assert teacher["head"]["kernel"].is_deleted() is False


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("make", [toy.full, toy.low_rank])
def test_a_prepared_step_is_compiled_once_and_before_the_weights_are_there(shape, make):
    mesh, key, compiled = mesh_of(*shape), jax.random.key(0), []
    expected = run(mesh, 2, method=make())[0]
    model, method, optimizer = toy.model(constrain=sharding.constrainer(mesh)), make(), optax.adam(1e-2)
    planned = state.plan(model, method, optimizer, jax.eval_shape(model.init, key), mesh)
    one = step.make_step(model, method, causal_lm.make(chunk_size=5), optimizer, mesh=mesh)

    def note(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        one.prepare(*planned, {}, sharding.abstract_batch(toy.batch(0, 8), mesh))
        s, base = state.start(model, method, optimizer, model.init(jax.random.key(1)), key, mesh)
        like = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), (s, base))
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), planned) == like
        losses = []
        for i in range(2):
            s, metrics = one(s, base, {}, one.put(toy.batch(i, 8)))
            losses.append(metrics["loss"])
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert sum("update" in name for name in compiled) == 1
    np.testing.assert_array_equal(losses, expected)


def test_what_fails_to_compile_is_told_by_the_first_call(monkeypatch):
    s, base, one = begin(mesh_of())
    lowered = type("Lowered", (), {"compile": lambda self: 1 / 0})()
    monkeypatch.setattr(one, "lower", lambda *_: lowered)
    one.prepare(s, base, {}, toy.batch(0))
    with pytest.raises(ZeroDivisionError):
        one(s, base, {}, one.put(toy.batch(0)))
    one(s, base, {}, one.put(toy.batch(0)))
