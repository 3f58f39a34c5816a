"""The loop: logging, evaluation, the best checkpoint, early stop, bad steps."""

import json

import jax
import numpy as np
import optax
import pytest
import toy

from tunejax.core import errors
from tunejax.objectives import causal_lm
from tunejax.train import checkpoint, loop, metrics, optimizer, sharding, state, step


@pytest.fixture(scope="module")
def parts():
    """A step that all tests of this file share (one compilation), and a way to begin."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model, method = toy.model(), toy.low_rank()
    tuner = optimizer.make_optimizer("adamw", 1e-2)
    one = step.make_step(model, method, causal_lm.make(), tuner, mesh=mesh)

    def begin():
        return state.start(model, method, tuner, model.init(jax.random.key(0)), jax.random.key(1), mesh)

    return one, begin


def fit(parts, loader, *, options=None, **kw):
    one, begin = parts
    return loop.fit(one, *begin(), loader, loop.Options(progress=False, **(options or {})), **kw)


def test_logs_means_over_the_interval_and_stops_at_the_end_of_the_data(parts, tmp_path):
    every = fit(parts, toy.Loader(total=7), options={"logging_steps": 1})
    grouped = fit(parts, toy.Loader(total=7), options={"logging_steps": 5},
                  writers=lambda n: metrics.make_writers(tmp_path, ("tensorboard",), n))  # fmt: skip
    assert (grouped.stopped, grouped.step) == ("data", 7)
    assert [h["step"] for h in grouped.history] == [5, 7]
    rows = every.history[:5]
    want = sum(h["loss"] * h["weight"] for h in rows) / sum(h["weight"] for h in rows)
    np.testing.assert_allclose(grouped.history[0]["loss"], want, rtol=1e-6)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == grouped.history
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_host_does_not_wait_between_reports(parts, monkeypatch):
    fetches = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetches.append(1) or real(x))
    fit(parts, toy.Loader(), options={"max_steps": 20, "logging_steps": 10})
    assert len(fetches) == 2


def test_evaluation_is_exact_over_ragged_batches(parts):
    result = fit(parts, toy.Loader(total=1), options={"eval_steps": 1}, eval_loader=lambda: iter(
        [toy.batch(50, 8), toy.batch(51, 3)]), on_eval=lambda s, at: {"twice": 2.0 * at})  # fmt: skip
    found = next(h for h in result.history if "eval_loss" in h)
    assert found["eval_twice"] == 2.0
    one, _ = parts
    s, base = parts[1]()
    s, _ = one(s, base, {}, one.put(toy.batch(0)))
    sums = [jax.device_get(one.evaluate(s, base, {}, one.put(toy.batch(i, n))))["loss"] for i, n in ((50, 8), (51, 3))]
    total, weight = (sum(p[i] for p in sums) for i in range(2))
    np.testing.assert_allclose(found["eval_loss"], total / weight, rtol=1e-6)


def test_keeps_the_last_and_the_best_and_resumes_counting(parts, tmp_path):
    scores = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.6, 10: 0.4}
    options = {"max_steps": 8, "eval_steps": 2, "save_steps": 2, "metric_for_best_model": "score"}
    kw = {"eval_loader": lambda: toy.Loader(total=1), "on_eval": lambda s, at: {"score": scores[at]}}
    keeper = checkpoint.Checkpointer(tmp_path, keep=2, greater_is_better=True)
    first = fit(parts, toy.Loader(), options=options, checkpointer=keeper, **kw)
    assert (first.best_step, first.best) == (4, 0.9)
    assert keeper.steps() == [4, 6, 8]
    patient = {**options, "max_steps": 20, "early_stopping_patience": 3}
    second = fit(parts, toy.Loader(), options=patient, checkpointer=keeper, **kw)
    assert (second.resumed_from, second.stopped, second.step) == (8, "early", 10)
    assert second.best_step == 4
    best = keeper.restore(second.state, 4)
    assert int(best.state.step) == 4
    keeper.close()


def test_a_finished_run_does_nothing_more(parts, tmp_path):
    keeper = checkpoint.Checkpointer(tmp_path)
    first = fit(parts, toy.Loader(), options={"max_steps": 3}, checkpointer=keeper)
    again = fit(parts, toy.Loader(), options={"max_steps": 3}, checkpointer=keeper)
    assert (again.step, again.history) == (3, [])
    jax.tree.map(np.testing.assert_array_equal, again.state.train, first.state.train)
    keeper.close()


def test_too_many_bad_steps_stop_the_run_and_leave_a_good_checkpoint(parts, tmp_path):
    keeper = checkpoint.Checkpointer(tmp_path)
    options = {"logging_steps": 1, "save_steps": 2, "max_nonfinite_steps": 3, "max_steps": 20}
    with pytest.raises(errors.TunejaxError, match="stopped at step 7: 3 steps in a row"):
        fit(parts, toy.Loader(poison=range(4, 20)), options=options, checkpointer=keeper)
    found = keeper.restore(parts[1]()[0]).state
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.train))
    good = fit(parts, toy.Loader(), options={"max_steps": 4})
    jax.tree.map(np.testing.assert_array_equal, found.train, good.state.train)
    assert fit(parts, toy.Loader(poison=(2, 3)), options={"max_steps": 6, "max_nonfinite_steps": 3}).step == 6
    keeper.close()


def test_an_unknown_best_metric_is_named(parts):
    with pytest.raises(errors.ConfigError, match="eval_accuracy"):
        fit(parts, toy.Loader(), options={"max_steps": 1, "metric_for_best_model": "acuracy"},
            eval_loader=lambda: toy.Loader(total=1))  # fmt: skip


def test_a_batch_that_does_not_divide_is_refused(parts):
    with pytest.raises(errors.ConfigError, match="3 rows"):
        sharding.put_batch(toy.batch(0, 3), sharding.make_mesh(devices=jax.devices()[:2]))
    with pytest.raises(errors.ConfigError, match="mesh"):
        sharding.make_mesh(3, 1, 1)


def test_json_lines_drop_what_a_resumed_run_writes_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    out = metrics.JsonLines(path, resume_step=2)
    out.write(3, {"loss": float("nan")})
    out.close()
    assert [json.loads(x) for x in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": None},
    ]


def test_reports_are_checked(tmp_path):
    with pytest.raises(errors.ConfigError, match="tensorboard"):
        metrics.make_writers(tmp_path, ("tensorbord",))


def test_an_optax_optimiser_will_do():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    s, _ = state.start(toy.model(), toy.low_rank(), optax.lion(1e-3), toy.model().init(jax.random.key(0)),
                       jax.random.key(1), mesh)  # fmt: skip
    assert state.count(s.opt_state) > 0


def test_time_and_memory_of_the_steps_go_on_over_a_stop(parts, tmp_path):
    keeper = checkpoint.Checkpointer(tmp_path)
    options = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1}
    first = fit(parts, toy.Loader(), options=options, checkpointer=keeper, eval_loader=lambda: toy.Loader(total=1))
    tokens = [int(np.count_nonzero(toy.batch(i)["segment_ids"])) for i in range(6)]
    assert first.watch.tokens == sum(tokens[1:4])
    assert not first.watch.running
    times = [h["train_seconds"] for h in first.history]
    assert times == sorted(times)
    assert 0 < times[-1] <= first.watch.seconds
    again = fit(parts, toy.Loader(), options={**options, "max_steps": 6}, checkpointer=keeper)
    assert again.watch.tokens == sum(tokens[1:4]) + tokens[5]
    assert again.watch.seconds > first.watch.seconds
    assert again.memory == first.memory
    keeper.close()


def test_memory_of_the_step_is_what_the_compiler_says(parts):
    one, begin = parts
    held, base = begin()
    placed = one.put(toy.batch(0))
    given = state.nbytes((held, base, placed))
    found = fit(parts, toy.Loader(), options={"max_steps": 1}).memory
    assert found == one.memory(held, base, {}, placed)
    assert given < found < 100 * given
    assert fit(parts, iter([toy.batch(0), toy.batch(1, 32)])).memory > found
