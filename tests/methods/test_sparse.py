"""FISH, LT-SFT and diff pruning on small cases worked by hand, and in a run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trains

from tunejax.core import errors, paths, sparse
from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.methods import diff_pruning, fish, full, lora, lt_sft
from tunejax.train import checkpoint

KEY, CTX = jax.random.key(0), Context()
W, B = "w/kernel", "w/bias"
SMALL = ["mlp/down/kernel", "/norm/scale"]
P = {"w": {"kernel": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.asarray([5.0, 6.0])}}


def at(kernel, bias):
    return {W: jnp.asarray(kernel, jnp.float32), B: jnp.asarray(bias, jnp.float32)}


def test_the_greatest_over_all_leaves_and_ties():
    mask = sparse.greatest(at([[1.0, 9.0], [3.0, 4.0]], [8.0, 0.0]), 0.5)
    np.testing.assert_array_equal(mask[W], [[False, True], [False, True]])
    np.testing.assert_array_equal(mask[B], [True, False])
    # Entries of equal score are taken in order, and no more of them than asked for.
    mask = sparse.greatest(at([[0.0, 0.0], [1.0, 0.0]], [0.0, 0.0]), 0.5)
    np.testing.assert_array_equal(mask[W], [[True, True], [True, False]])
    assert not mask[B].any()
    assert sum(int(m.sum()) for m in sparse.greatest(at([[0.0, 0.0], [1.0, 0.0]], [0.0, 0.0]), 1e-9).values()) == 1


def test_sums_are_rounded_once_to_the_type_of_the_base():
    p = {"w": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}}
    out = sparse.added(p, {W: jnp.full((2, 2), 0.5)})["w"]["kernel"]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 1.5)


def test_fish_by_hand():
    method = fish.fish(density=0.5, mask_steps=2)
    start = method.init(KEY, P)
    state, current = start.state, start.train
    grads = [at([[3.0, 0.0], [0.0, 1.0]], [2.0, 0.0]), at([[0.0, -1.0], [0.0, 4.0]], [0.0, 1.0])]
    moved = [at(np.full((2, 2), 0.1), [0.1, 0.1]), at(np.full((2, 2), 0.3), [0.2, 0.2])]
    for g, train in zip(grads, moved, strict=True):
        # the gradient is that of the parameters themselves, and they stand still whatever the optimiser did
        full_grad = jax.grad(lambda t, s: jnp.sum(method.bind(P, t, s, CTX)["w"]["kernel"] ** 2))(current, state)
        np.testing.assert_allclose(full_grad[W], 2 * P["w"]["kernel"])
        state, current = method.update(train, state, g, CTX), train
        bound = method.bind(P, train, state, CTX)
        jax.tree.map(np.testing.assert_array_equal, bound, P)
    # ((9 + 0, 0 + 1), (0, 1 + 16)), (4, 1) halved: the three greatest are 17, 9 and 4
    np.testing.assert_allclose(state["fisher"][W], [[4.5, 0.5], [0.0, 8.5]])
    np.testing.assert_allclose(state["fisher"][B], [2.0, 0.5])
    np.testing.assert_array_equal(state["mask"][W], [[True, False], [False, True]])
    np.testing.assert_array_equal(state["mask"][B], [True, False])
    later = {p: x + 1.0 for p, x in moved[-1].items()}
    after = method.update(later, state, grads[0], CTX)
    assert int(after["updates"]) == 3
    for name in ("mask", "origin", "fisher"):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
    merged = method.merge(P, later, after)
    np.testing.assert_allclose(merged["w"]["kernel"], [[2.0, 2.0], [3.0, 5.0]])
    np.testing.assert_allclose(merged["w"]["bias"], [6.0, 6.0])


def test_lt_sft_by_hand():
    method = lt_sft.lt_sft(mask_steps=2, density=0.34, l1=0.6)
    start = method.init(KEY, P)
    zero = jax.tree.map(jnp.zeros_like, start.train)
    first = at([[0.5, 0.0], [0.0, 0.0]], [0.0, 0.0])
    state = method.update(first, start.state, zero, CTX)
    np.testing.assert_allclose(method.bind(P, first, state, CTX)["w"]["kernel"], [[1.5, 2.0], [3.0, 4.0]])
    second = at([[0.1, -0.9], [0.2, 0.0]], [0.3, -0.1])
    np.testing.assert_allclose(method.penalty(second, state, CTX), 0.6 * 1.6 / 6, rtol=1e-6)
    state = method.update(second, state, zero, CTX)
    np.testing.assert_array_equal(state["mask"][W], [[False, True], [False, False]])
    np.testing.assert_array_equal(state["mask"][B], [True, False])
    jax.tree.map(np.testing.assert_array_equal, method.bind(P, second, state, CTX), P)
    third = {p: x + 0.25 for p, x in second.items()}
    state = method.update(third, state, zero, CTX)
    merged = method.merge(P, third, state)
    np.testing.assert_allclose(merged["w"]["kernel"], [[1.0, 2.25], [3.0, 4.0]])
    np.testing.assert_allclose(merged["w"]["bias"], [5.25, 6.0])
    np.testing.assert_allclose(method.penalty(third, state, CTX), 0.6 * 0.5 / 6, rtol=1e-6)


def test_gates_by_hand():
    alpha = jnp.asarray([-9.0, -0.5, 0.0, 0.5, 9.0])
    s = 1 / (1 + np.exp(-np.asarray(alpha)))
    np.testing.assert_allclose(diff_pruning.gate(alpha), np.clip(3 * s - 1.5, 0, 1), atol=1e-6)
    np.testing.assert_allclose(diff_pruning.gate(alpha)[jnp.asarray([0, 2, 4])], [0, 0, 1], atol=1e-6)
    # The part of gates that is open is the penalty's sigmoid(alpha - log(-l / r)) = sigmoid(alpha).
    drawn = diff_pruning.gate(jnp.full((20000,), 0.7), KEY)
    assert abs(float((drawn > 0).mean()) - 1 / (1 + np.exp(-0.7))) < 0.01
    # z = 1 from s = 5/6 on: log u - log(1 - u) > log 5 - 0.7
    assert abs(float((drawn == 1).mean()) - 1 / (1 + np.exp(np.log(5) - 0.7))) < 0.01


def test_diff_pruning_by_hand():
    method = diff_pruning.diff_pruning(mask_steps=1, targets="**", density=0.34, penalty=0.5, gate_init=0.0)
    start = method.init(KEY, P)
    assert float(method.penalty(start.train, start.state, CTX)) == 0.5 * 6 * 0.5
    w, alpha = at([[1.0, 2.0], [-3.0, 4.0]], [5.0, 6.0]), at([[9.0, 9.0], [9.0, -9.0]], [-9.0, 0.1])
    train = {p: {"w": w[p], "alpha": alpha[p]} for p in w}
    z = 3 / (1 + np.exp(-0.1)) - 1.5
    bound = method.bind(P, train, start.state, CTX)
    np.testing.assert_allclose(bound["w"]["kernel"], [[2.0, 4.0], [0.0, 4.0]], rtol=1e-6)
    np.testing.assert_allclose(bound["w"]["bias"], [5.0, 6 + 6 * z], rtol=1e-5)
    noisy = method.bind(P, train, start.state, Context(key=KEY, train=True))
    assert abs(float(noisy["w"]["bias"][1] - bound["w"]["bias"][1])) > 1e-3
    state = method.update(train, start.state, None, CTX)
    np.testing.assert_array_equal(state["mask"][W], [[False, True], [True, False]])
    assert not state["mask"][B].any()
    for ctx in (CTX, Context(key=KEY, train=True)):  # no noise and no penalty any more
        kernel = method.bind(P, train, state, ctx)["w"]["kernel"]
        np.testing.assert_allclose(kernel, [[1.0, 4.0], [0.0, 4.0]], rtol=1e-6)
        assert float(method.penalty(train, state, ctx)) == 0.0


def changed(s, base, method):
    """How many entries differ from the base, and how many there are, over the targets."""
    bound = paths.flatten(method.bind(base, s.train, s.state, CTX))
    old = paths.flatten(base)
    return sum(int((bound[p] != old[p]).sum()) for p in s.train), sum(old[p].size for p in s.train)


def test_fish_in_a_run():
    losses, s = trains.run({"name": "fish", "mask_steps": 2, "density": 0.1, "targets": SMALL}, steps=6)
    assert losses[0] == losses[1] == losses[2]
    assert all(b < a for a, b in itertools.pairwise(losses[2:])), losses
    moved, total = changed(s, tiny.params(), fish.fish())
    assert 0.09 * total < moved <= round(0.1 * total)


def test_lt_sft_in_a_run():
    losses, s = trains.run({"name": "lt_sft", "mask_steps": 3, "density": 0.1, "targets": SMALL}, steps=7)
    assert losses[3] == losses[0] > losses[1] > losses[2]
    assert all(b < a for a, b in itertools.pairwise(losses[3:])), losses
    moved, total = changed(s, tiny.params(), lt_sft.lt_sft(1))
    assert 0.09 * total < moved <= round(0.1 * total)


def test_a_run_that_is_stopped_before_its_mask_is_found_ends_in_the_same_bytes(tmp_path):
    spec = {"name": "fish", "mask_steps": 3, "density": 0.1, "targets": SMALL}
    one, s, base, batch = trains.begin(spec)
    saver = checkpoint.Checkpointer(tmp_path)
    for i in range(5):
        s, _ = one(s, base, {}, batch)
        if i == 1:
            saver.save(s, {}, {})
            saver.wait()
    again = saver.restore(trains.begin(spec)[1]).state
    saver.close()
    assert int(again.step) == int(again.state["updates"]) == 2
    for _ in range(3):
        again, _ = one(again, base, {}, batch)
    for a, b in zip(jax.tree.leaves((s.train, s.state)), jax.tree.leaves((again.train, again.state)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_diff_pruning_in_a_run():
    losses, s = trains.run({"name": "diff_pruning", "mask_steps": 4, "density": 0.1, "targets": SMALL}, steps=8)
    assert losses[0] > losses[1] > losses[2]
    assert all(b < a for a, b in itertools.pairwise(losses[4:])), losses
    moved, total = changed(s, tiny.params(), diff_pruning.diff_pruning(4))
    assert 0.09 * total < moved <= round(0.1 * total)


@pytest.mark.parametrize(
    "make",
    [fish.fish, lambda *a, **kw: lt_sft.lt_sft(1, *a, **kw), lambda *a, **kw: diff_pruning.diff_pruning(1, *a, **kw)],
)
def test_what_they_refuse(make):
    with pytest.raises(errors.ConfigError, match="density"):
        make(density=0.0)
    with pytest.raises(errors.ConfigError, match="mask_steps"):
        fish.fish(mask_steps=0)
    with pytest.raises(errors.TargetError, match="wraps"):
        methods.chain(lora.lora("attention/q/kernel"), make("attention/q/kernel")).init(KEY, tiny.params())
    with pytest.raises(errors.TargetError, match="put full first"):
        methods.chain(make("norm/scale"), full.full("norm/scale")).init(KEY, tiny.params())
    assert make("mlp/**", layers="1:").cuts(3) == (1,)
