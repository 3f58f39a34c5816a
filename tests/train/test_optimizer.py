"""Optimisers against torch's and Hugging Face's, schedules against `transformers.optimization`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from tunejax.core import errors
from tunejax.methods import p_tuning
from tunejax.train import optimizer, schedule

torch = pytest.importorskip("torch")
KERNEL, BIAS, NORM = "layers/0/attention/q/kernel", "layers/0/attention/q/bias", "layers/0/attention/norm/scale"


def leaves():
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in ((KERNEL, (1, 6, 4)), (BIAS, (1, 4)), (NORM, (1, 6)))}


def grads(i):
    rng = np.random.default_rng(100 + i)
    return {k: rng.normal(size=x.shape).astype(np.float32) for k, x in leaves().items()}


def ours(tuner, steps=6):
    train = jax.tree.map(jnp.asarray, leaves())
    opt = tuner.init(train)
    update = jax.jit(tuner.update)
    for i in range(steps):
        updates, opt = update(grads(i), opt, train)
        train = optax.apply_updates(train, updates)
    return jax.device_get(train)


def theirs(make, steps=6, decay=0.1, only=None):
    params = {k: torch.nn.Parameter(torch.tensor(x[0] if k == KERNEL else x)) for k, x in leaves().items()}
    names = [k for k in params if only is None or k in only]
    groups = [{"params": [params[k]], "weight_decay": decay if k == KERNEL else 0.0} for k in names]
    tuner = make(groups)
    for i in range(steps):
        for k in names:
            params[k].grad = torch.tensor(grads(i)[k].reshape(params[k].shape))
        tuner.step()
    return {k: params[k].detach().numpy().reshape(leaves()[k].shape) for k in names}


def agree(got, want, atol=1e-6):
    for k, x in want.items():
        np.testing.assert_allclose(got[k], x, atol=atol, err_msg=k)


def test_adamw_decays_kernels_only_as_the_trainer_does():
    got = ours(optimizer.make_optimizer("adamw_torch", 1e-2, weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-6))
    agree(got, theirs(lambda g: torch.optim.AdamW(g, lr=1e-2, betas=(0.8, 0.95), eps=1e-6)))


def test_a_beta_of_0_is_one():
    got = ours(optimizer.make_optimizer("adamw", 1e-2, weight_decay=0.1, b1=0.0, b2=0.0, eps=1e-3))
    agree(got, theirs(lambda g: torch.optim.AdamW(g, lr=1e-2, betas=(0.0, 0.0), eps=1e-3)))


def test_sgd():
    agree(ours(optimizer.make_optimizer("sgd", 1e-2, weight_decay=0.1)),
          theirs(lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9)))  # fmt: skip


def test_adafactor_below_the_size_that_is_factored():
    """The same formula as torch's where the second moment is kept whole (vectors)."""
    transformers = pytest.importorskip("transformers.optimization")
    if not hasattr(transformers, "Adafactor"):
        pytest.skip("this transformers has no Adafactor")
    got = ours(optimizer.make_optimizer("adafactor", 1e-2))
    want = theirs(lambda g: transformers.Adafactor(g, lr=1e-2, scale_parameter=False, relative_step=False), decay=0.0,
                  only={BIAS, NORM})  # fmt: skip
    assert all(got[k].shape[0] == 1 for k in want)
    for k in want:  # a [1, n] matrix is factored there, so only the size of the move is the same
        assert np.linalg.norm(got[k] - leaves()[k]) < 6e-2 * np.sqrt(leaves()[k].size) * 1.1


def test_lion_by_its_formula():
    got, p, m = ours(optimizer.make_optimizer("lion", 1e-2, weight_decay=0.1)), leaves()[KERNEL], 0.0
    for i in range(6):
        g = grads(i)[KERNEL]
        p = p - 1e-2 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p)
        m = 0.99 * m + 0.01 * g
    agree(got, {KERNEL: p})


def test_muon_moves_kernels_as_torch_does_and_the_rest_as_adam():
    got = ours(optimizer.make_optimizer("muon", 1e-2, weight_decay=0.1), steps=30)
    make = lambda g: torch.optim.Muon(g, lr=1e-2, adjust_lr_fn="match_rms_adamw")  # noqa: E731
    want = theirs(make, steps=30, only={KERNEL})[KERNEL]
    a, b = (x - leaves()[KERNEL] for x in (got[KERNEL], want))
    assert np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.95  # torch iterates in bfloat16
    assert 0.9 < np.linalg.norm(a) / np.linalg.norm(b) < 1.1
    agree(got, theirs(lambda g: torch.optim.AdamW(g, lr=1e-2), steps=30, only={BIAS, NORM}), atol=1e-5)


def test_groups_scale_rates_and_decay():
    groups = {"attention/norm/*": {"learning_rate": 0.0}, "kernel": {"learning_rate": 5e-3, "weight_decay": 0.0}}
    got = ours(optimizer.make_optimizer("adamw", 1e-2, weight_decay=0.1, groups=groups))
    np.testing.assert_array_equal(got[NORM], leaves()[NORM])
    agree(got, theirs(lambda g: torch.optim.AdamW(g, lr=5e-3), decay=0.0, only={KERNEL}))
    agree(got, theirs(lambda g: torch.optim.AdamW(g, lr=1e-2), only={BIAS}))


def test_mistakes_are_named():
    with pytest.raises(errors.ConfigError, match="adamw"):
        optimizer.make_optimizer("adamv", 1e-3)
    with pytest.raises(errors.ConfigError, match="weight_decay"):
        optimizer.make_optimizer("adamw", 1e-3, groups={"kernel": {"weight_decy": 1.0}})
    with pytest.raises(errors.TargetError, match="matches nothing that trains"):
        optimizer.make_optimizer("adamw", 1e-3, groups={"kernl": {"scale": 2.0}}).init(leaves())
    with pytest.raises(errors.ConfigError, match="cosine"):
        schedule.make_schedule("cosin", 1.0, total_steps=10)
    with pytest.raises(errors.ConfigError, match="longer than the run"):
        schedule.make_schedule("linear", 1.0, total_steps=10, warmup_steps=11)


def transformers_rates(name, total, warmup, **kw):
    hf = pytest.importorskip("transformers.optimization")
    tuner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    kw = {"scheduler_specific_kwargs": kw} if kw else {}
    rates = hf.get_scheduler(name, tuner, num_warmup_steps=warmup, num_training_steps=total, **kw)
    out = []
    for _ in range(total):
        out.append(rates.get_last_lr()[0])
        tuner.step()
        rates.step()
    return out


@pytest.mark.parametrize(("name", "theirs", "mine"), [
    ("linear", {}, {}),
    ("cosine", {}, {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"min_lr_ratio": 0.1}),
    ("constant_with_warmup", {}, {}),
    ("inverse_sqrt", {}, {}),
    ("warmup_stable_decay", {"num_decay_steps": 8}, {"decay_ratio": 0.2}),
])  # fmt: skip
def test_schedules_equal_transformers(name, theirs, mine):
    rates = schedule.make_schedule(name, 2e-3, total_steps=40, warmup_ratio=0.11, **mine)
    np.testing.assert_allclose(
        [float(rates(i)) for i in range(40)], transformers_rates(name, 40, 5, **theirs), rtol=2e-5
    )


def test_what_decays():
    assert optimizer.decays("0:lora/layers/0/attention/q/kernel/a")
    assert not any(
        optimizer.decays(p) for p in ("layers/0/mlp/up/bias", "norm/scale", "embed_norm/bias", "x/q_norm/scale")
    )
    assert not any(optimizer.decays(f"layers/0/mlp/down/kernel/{n}") for n in ("down_bias", "up_bias", "gate_bias"))
    train = p_tuning.p_tuning(2, encoder="lstm", lstm_layers=1).init(jax.random.key(0), tiny.params()).train
    decaying = {n for n in train["embed/table"] if optimizer.decays(f"embed/table/{n}")}
    assert decaying == {"rows", "w0", "w1", "lstm0_x", "lstm0_h"}
