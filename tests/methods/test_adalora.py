"""AdaLoRA: the forward pass and the allocation against HF PEFT, the importance against the paper's equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_pair
import pytest

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.methods import adalora

torch = peft_pair.torch
STEPS = {"total_step": 20, "tinit": 3, "tfinal": 5, "deltaT": 2}
RANKS = {"init_r": 4, "target_r": 2}
SPEC = {"name": "adalora", **RANKS, **STEPS, "lora_alpha": 5.0}


def config(**more):
    return functools.partial(peft_pair.peft.AdaLoraConfig, **RANKS, **STEPS, lora_alpha=5, **more)


def arrays(m, read):
    return {
        "a": read(m.lora_A["default"]).T,
        "e": read(m.lora_E["default"])[:, 0],
        "b": read(m.lora_B["default"]).T,
    }


@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_logits_and_gradients_equal_peft(family, tmp_path):
    peft_pair.check(family, tmp_path, config(), SPEC, arrays)


def test_allocation_equals_peft(tmp_path):
    """The same gradients for 20 steps, plain descent: the same singular values are pruned and come back."""
    theirs = peft_pair.wrapped("llama", tmp_path, config())
    layers = peft_pair.layers_of(theirs, "llama")
    weights = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    params, _ = peft_pair.hf.load(tmp_path, peft_pair.hf.read_config(tmp_path), head="lm")
    targets = [f"{p}/kernel" for p in peft_pair.SITES["llama"].values()]
    method = peft_pair.registry.build({**SPEC, "targets": targets})
    train = peft_pair.stacked(layers, arrays, peft_pair.value)
    state = method.init(jax.random.key(0), params).state
    update = jax.jit(lambda *a: method.update(*a[:3], Context(step=a[3])))
    torch.manual_seed(1)
    counts, returned = [], 0
    for step in range(STEPS["total_step"]):
        for p in weights.values():
            p.grad = torch.randn_like(p)
        grads = peft_pair.stacked(layers, arrays, peft_pair.gradient)
        with torch.no_grad():
            for p in weights.values():
                p -= 0.1 * p.grad
        train = jax.tree.map(lambda w, g: w - np.float32(0.1) * g, train, grads)
        theirs.base_model.update_and_allocate(step)
        state = update(train, state, grads, step)
        wanted = peft_pair.stacked(layers, arrays, peft_pair.value)
        values = {p: np.asarray(train[p]["e"] - state[p]["zero"]) for p in train}
        for p in train:
            np.testing.assert_allclose(values[p], wanted[p]["e"], atol=1e-5)
        counts.append(sum(int((v != 0).sum()) for v in values.values()))
        returned += len(counts) > 1 and counts[-1] > counts[-2]
    matrices = 2 * len(targets)
    assert counts[: STEPS["tinit"] + 1] == [4 * matrices] * 4
    assert counts[-1] == 2 * matrices
    assert returned, "no pruned value came back between prunings"


def test_importance_follows_the_paper():
    """Equations 7 to 11 in numpy, for three steps of one site."""
    rng = np.random.default_rng(0)
    b1, b2 = 0.8, 0.7
    shapes = {"a": (5, 3), "e": (3,), "b": (3, 6)}
    state = {n: {k: jnp.zeros(s) for k, s in shapes.items()} for n in ("sensitivity", "uncertainty")}
    state["zero"] = jnp.asarray([0.0, 0.3, 0.0])
    mean = {k: np.zeros(s) for k, s in shapes.items()}
    spread = {k: np.zeros(s) for k, s in shapes.items()}
    for _ in range(3):
        w, g = ({k: rng.standard_normal(s) for k, s in shapes.items()} for _ in range(2))
        state = adalora.averages(w, state, g, b1, b2)
        for k in shapes:
            now = np.abs((w[k] - np.array([0, 0.3, 0]) if k == "e" else w[k]) * g[k])
            mean[k] = b1 * mean[k] + (1 - b1) * now
            spread[k] = b2 * spread[k] + (1 - b2) * np.abs(now - mean[k])
    s = {k: mean[k] * spread[k] for k in shapes}
    expected = [s["e"][i] + sum(s["a"][:, i]) / 5 + sum(s["b"][i]) / 6 for i in range(3)]
    np.testing.assert_allclose(adalora.importance(state), expected, rtol=1e-5)


def test_the_budget_follows_the_cubic():
    total, warmup, final = 40, 4, 4
    for step in range(total):
        share, prunes = adalora.schedule(step, total, warmup, final, 8)
        inside = 1 - (step - warmup) / (total - final - warmup)
        np.testing.assert_allclose(share, np.clip(inside, 0, 1) ** 3, atol=1e-6)
        assert bool(prunes) == (step in (8, 16, 24, 32) or step >= total - final)


def test_the_penalty_equals_peft(tmp_path):
    theirs = peft_pair.wrapped("llama", tmp_path, config(orth_reg_weight=0.3))
    tokens = torch.arange(8)[None]
    with_it = theirs.base_model(input_ids=tokens, labels=tokens).loss
    without = theirs.base_model.model(input_ids=tokens, labels=tokens).loss
    train = peft_pair.stacked(peft_pair.layers_of(theirs, "llama"), arrays, peft_pair.value)
    method = adalora.adalora(20, orthogonal=0.3)
    np.testing.assert_allclose(method.penalty(train, {}, Context()), (with_it - without).item(), rtol=1e-4)
    zeros = {"w": {"a": jnp.eye(5)[:, :2], "e": jnp.zeros(2), "b": jnp.eye(4)[:2]}}
    grads = jax.grad(lambda t: method.penalty(t, {}, Context()))(zeros)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bad_arguments_are_all_named():
    with pytest.raises(errors.ConfigError, match=r"target_rank is 9.*leave none of total_steps 5.*beta1 is 1"):
        adalora.adalora(5, rank=8, target_rank=9, warmup_steps=3, final_steps=2, beta1=1.0)
