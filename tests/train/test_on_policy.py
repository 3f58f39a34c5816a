"""On-policy steps: what the student writes is what it would, and the teacher's loss on that is learned."""

import jax
import numpy as np
import tiny
import trains

from tunejax.core.method import Context
from tunejax.generate import decode, sampling
from tunejax.methods import registry
from tunejax.objectives import causal_lm, distill
from tunejax.train import on_policy, optimizer, sharding, step

STOP = 7
OPTIONS = on_policy.Options(
    fraction=1.0,
    max_new_tokens=6,
    sampling=sampling.Sampling(temperature=1.5),
    stop_tokens=(STOP,),
    buckets=(32, 64),
    seed=3,
)


def begin(method=None):
    """(step, state, base, frozen, host batch) with a teacher; the batch's prompts have three tokens."""
    _, s, base, _ = trains.begin(method or {"name": "lora", "rank": 2})
    teacher = jax.tree.map(lambda x: 1.5 * x, tiny.params())
    options = distill.Options(alpha=0.0, divergence="jensen_shannon", temperature=1.0)
    objective = distill.make(causal_lm.make(), tiny.model(), teacher, options)
    built = registry.build(method or {"name": "lora", "rank": 2})
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    one = step.make_step(tiny.model(), built, objective, optimizer.make_optimizer("adamw", 1e-2), mesh=mesh)
    batch = trains.rows()
    batch["loss_weights"] = np.broadcast_to(np.arange(8) >= 2, (4, 8)).astype(np.float32)
    return one, s, base, objective.frozen, batch


class Spy:
    """A step that keeps what it is given."""

    def __init__(self, inner):
        self.inner, self.seen = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, state, base, frozen, batch):
        self.seen.append(jax.device_get(batch))
        return self.inner(state, base, frozen, batch)


def test_the_batch_is_what_the_student_says_and_the_loss_is_the_teachers():
    one, s, base, frozen, batch = begin()
    bound = one.method.bind(base, s.train, s.state, Context())
    said = decode.generate(
        tiny.model(), bound, batch["tokens"][:, :3], max_new_tokens=6, sampling=OPTIONS.sampling, stop_tokens=(STOP,),
        key=jax.random.fold_in(jax.random.key(3), 0),
    )  # fmt: skip
    m, teacher = tiny.model(), jax.tree.map(lambda x: 1.5 * x, tiny.params())
    total, weight = 0.0, 0
    for prompt, new in zip(batch["tokens"][:, :3], np.asarray(said), strict=True):
        end = (new.tolist().index(STOP) + 1) if STOP in new else len(new)
        ids = np.concatenate([prompt, new[:end]])[None]
        x, y = (m.logits(w, m.hidden(w, {"tokens": ids})[0])[0, 2:-1] for w in (bound, teacher))
        q, p = jax.nn.softmax(x), jax.nn.softmax(y)
        half = (p + q) / 2
        total += float((p * np.log(p / half) + q * np.log(q / half)).sum() / 2)
        weight += end
    spy = Spy(one)
    wrapped = on_policy.OnPolicy(spy, OPTIONS)
    _, metrics = wrapped(s, base, frozen, wrapped.put(batch))
    np.testing.assert_allclose(metrics["loss"], total / weight, rtol=2e-5)
    assert float(metrics["weight"]) == weight
    (seen,) = spy.seen
    np.testing.assert_array_equal(seen["tokens"][:, :3], batch["tokens"][:, :3])
    assert seen["tokens"].shape == (4, 32)


def test_the_fraction_mixes_steps():
    one, s, base, frozen, batch = begin()
    spy = Spy(one)
    wrapped = on_policy.OnPolicy(spy, OPTIONS._replace(fraction=0.5))
    for _ in range(12):
        s, _ = wrapped(s, base, frozen, batch)
    own = [np.array_equal(x["targets"][:, :8], batch["targets"]) for x in spy.seen]
    assert 2 <= sum(own) <= 10
    again = [np.random.default_rng((3, i)).random() >= 0.5 for i in range(12)]
    assert own == again


def test_virtual_tokens_stay_in_front_and_empty_rows_stay_empty():
    one, s, base, frozen, _ = begin({"name": "prompt_tuning", "length": 2})
    batch = trains.rows(prompt=2)
    batch["loss_weights"] = np.broadcast_to(np.arange(10) >= 5, (4, 10)).astype(np.float32).copy()
    batch["loss_weights"][3] = 0
    spy = Spy(one)
    on_policy.OnPolicy(spy, OPTIONS._replace(virtual=(31, 32)))(s, base, frozen, batch)
    (seen,) = spy.seen
    np.testing.assert_array_equal(seen["tokens"][:3, :6], batch["tokens"][:3, :6])
    assert not seen["segment_ids"][3].any()
    assert not seen["loss_weights"][3].any()


def test_evaluation_is_of_the_rows():
    one, s, base, frozen, batch = begin()
    wrapped = on_policy.OnPolicy(one, OPTIONS)
    want = one.evaluate(s, base, frozen, one.put(batch))
    jax.tree.map(np.testing.assert_array_equal, wrapped.evaluate(s, base, frozen, wrapped.put(batch)), want)
