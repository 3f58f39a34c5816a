"""A teacher that ran before: with all of its tokens it is the online one; with some of them, torch's buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import trains

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.objectives import causal_lm, classification, distill

TRAIN = Context(train=True)
RNG = np.random.default_rng(4)
STUDENT, TEACHER = 2 * RNG.standard_normal((2, 4, 8, 31), np.float32)
WEIGHTS = RNG.uniform(0, 1, (4, 8)).astype(np.float32) * (RNG.uniform(size=(4, 8)) < 0.7)
T = 2.0


def table():
    """A model whose parameters are its logits, so that their gradient is the gradient to the logits."""
    return tiny.model()._replace(
        hidden=lambda params, batch, **_: (params["logits"], {}), head=lambda params: {}, logits=lambda head, x: x
    )


def batch(k):
    """The rows with what a cache of k tokens holds of the teacher; zeros where nothing is learned, as a cache has."""
    log_p = np.asarray(torch.log_softmax(torch.tensor(TEACHER, dtype=torch.float64) / T, -1))
    ids = np.argsort(-log_p, axis=-1)[..., :k]
    top = np.take_along_axis(log_p, ids, -1)
    rest = log_p.copy()
    np.put_along_axis(rest, ids, -np.inf, -1)
    with np.errstate(divide="ignore"):
        tail = np.maximum(np.log(np.exp(rest).sum(-1)), -1e30)
    learned = WEIGHTS > 0
    return {
        **trains.rows(),
        "loss_weights": WEIGHTS,
        "teacher_ids": np.where(learned[..., None], ids, 0).astype(np.int32),
        "teacher_logprobs": np.where(learned[..., None], top, 0).astype(np.float32),
        "teacher_tail": np.where(learned, tail, 0).astype(np.float32),
    }


def loss_and_slope(objective, rows):
    def total(params):
        return objective.loss(table(), params, objective.frozen, rows, TRAIN)[0]

    loss, grads = jax.jit(jax.value_and_grad(total))({"logits": jnp.asarray(STUDENT)})
    return loss, grads["logits"]


@pytest.mark.parametrize("divergence", [d for d in distill.DIVERGENCES if d != "uld"])
def test_the_whole_vocabulary_is_the_online_loss(divergence):
    options = distill.Options(alpha=0.3, temperature=T, divergence=divergence, chunk_size=3)
    online = distill.make(causal_lm.make(), table(), {"logits": jnp.asarray(TEACHER)}, options)
    want, slope = loss_and_slope(online, batch(31))
    got, found = loss_and_slope(distill.from_cache(causal_lm.make(), options), batch(31))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(found, slope, atol=1e-5)


def buckets(logits, ids):
    """Log-probabilities [rows, k + 1] by torch: a row at a time, the others' summed one by one."""
    out = []
    for x, chosen in zip(torch.log_softmax(logits / T, -1), ids, strict=True):
        others = [i for i in range(len(x)) if i not in chosen]
        out.append(torch.cat([x[list(chosen)], x[others].exp().sum().log()[None]]))
    return torch.stack(out)


REFERENCES = {
    "forward_kl": lambda p, q: (p.exp() * (p - q)).sum(-1),
    "reverse_kl": lambda p, q: (q.exp() * (q - p)).sum(-1),
    "total_variation": lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2,
}


@pytest.mark.parametrize("k", [1, 5, 30])
@pytest.mark.parametrize("divergence", REFERENCES)
def test_few_tokens_and_the_rest_equal_torch(divergence, k):
    options = distill.Options(alpha=0.25, temperature=T, divergence=divergence)
    rows = batch(k)
    got, slope = loss_and_slope(distill.from_cache(causal_lm.make(), options), rows)
    s = torch.tensor(STUDENT.reshape(-1, 31), dtype=torch.float64, requires_grad=True)
    ids = np.argsort(-TEACHER.reshape(-1, 31), axis=-1)[:, :k].tolist()
    p = buckets(torch.tensor(TEACHER.reshape(-1, 31), dtype=torch.float64), ids)
    soft = REFERENCES[divergence](p, buckets(s, ids))
    hard = F.cross_entropy(s, torch.tensor(rows["targets"]).long().flatten(), reduction="none")
    want = (torch.tensor(WEIGHTS).flatten() * (0.25 * hard + 0.75 * T**2 * soft)).sum()
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    np.testing.assert_allclose(slope.reshape(-1, 31), s.grad.numpy(), atol=1e-5)


def test_buckets_by_hand():
    log_q = jnp.log(jnp.asarray([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]))
    log_p, tail = jnp.log(jnp.asarray([[0.6, 0.3], [0.5, 0.4]])), jnp.log(jnp.asarray([0.1, 0.1]))
    ids = jnp.asarray([[3, 0], [1, 2]])
    p, q = distill.bucketed(ids, log_p, tail, log_q)
    np.testing.assert_allclose(jnp.exp(p), [[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(q), [[0.4, 0.1, 0.5], [0.25, 0.25, 0.5]], rtol=1e-6)


def test_a_small_tail_is_not_lost_to_rounding():
    log_q = jax.nn.log_softmax(jnp.asarray([[30.0, 0.0, 1.0]]))
    _, q = distill.bucketed(jnp.asarray([[0]]), jnp.zeros((1, 1)), jnp.zeros(1), log_q)
    np.testing.assert_allclose(q[0, 1], np.logaddexp(-30.0, -29.0), rtol=1e-6)


@pytest.mark.parametrize("k", [2, 31])
def test_decoupled_takes_the_bucket_of_the_target(k):
    """Where the target is not among the k, its bucket is the tail, by probabilities."""
    options = distill.Options(alpha=0.0, temperature=T, divergence="decoupled", target_weight=1.5, beta=0.0)
    rows = batch(k)
    got, _ = loss_and_slope(distill.from_cache(causal_lm.make(), options), rows)
    p, q = (np.asarray(torch.softmax(torch.tensor(x, dtype=torch.float64) / T, -1)) for x in (TEACHER, STUDENT))
    want = 0.0
    for b, t in zip(*np.nonzero(WEIGHTS), strict=True):
        ids, target = rows["teacher_ids"][b, t], rows["targets"][b, t]
        hit = [target] if target in ids else [i for i in range(31) if i not in ids]
        a, c = p[b, t, hit].sum(), q[b, t, hit].sum()
        want += WEIGHTS[b, t] * 1.5 * (a * np.log(a / c) + (1 - a) * np.log((1 - a) / (1 - c)))
    np.testing.assert_allclose(got, T**2 * want, rtol=1e-5)


def test_labels_have_a_cache_too():
    m, p = tiny.model(tiny.BERT, "classification"), tiny.params(tiny.BERT, "classification")
    other = jax.tree.map(lambda x: 1.2 * x, p)
    rows = {**trains.rows(), "loss_weights": np.zeros((4, 8), np.float32)}
    rows["loss_weights"][:, 0] = 1
    rows["targets"] = np.tile(np.arange(4, dtype=np.int32)[:, None] % 3, (1, 8))
    log_p = jax.nn.log_softmax(m.logits(other, m.hidden(other, rows)[0]) / T)
    kept = {
        "teacher_ids": np.tile(np.arange(3, dtype=np.int32), (4, 8, 1)),
        "teacher_logprobs": np.asarray(log_p),
        "teacher_tail": np.full((4, 8), -1e30, np.float32),
    }
    options = distill.Options(temperature=T)
    online = distill.make(classification.make(), m, other, options)
    cached = distill.from_cache(classification.make(), options)
    want, weight, _ = online.loss(m, p, online.frozen, rows, TRAIN)
    got = cached.loss(m, p, cached.frozen, {**rows, **kept}, TRAIN)
    np.testing.assert_allclose(got[0], want, rtol=1e-6)
    assert float(got[1]) == float(weight) == 4


def test_evaluation_asks_for_no_teacher():
    cached = distill.from_cache(causal_lm.make())
    params = {"logits": jnp.asarray(STUDENT)}
    alone = causal_lm.make().loss(table(), params, {}, trains.rows(), Context())
    jax.tree.map(np.testing.assert_array_equal, cached.loss(table(), params, {}, trains.rows(), Context()), alone)


def test_bad_options_are_refused_here_too():
    with pytest.raises(errors.ConfigError, match=r"temperature is 0\.0"):
        distill.from_cache(causal_lm.make(), distill.Options(temperature=0.0))


def test_what_needs_whole_distributions_is_refused():
    with pytest.raises(errors.ConfigError, match="uld sorts whole distributions"):
        distill.from_cache(causal_lm.make(), distill.Options(divergence="uld"))
