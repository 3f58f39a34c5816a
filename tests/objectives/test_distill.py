"""Distillation of logits against torch: losses to 1e-6, gradients to 1e-5; and the wrapped objective as it was."""

import dataclasses

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
from tunejax.methods import registry
from tunejax.models import build
from tunejax.objectives import causal_lm, classification, distill, divergences, features, masked_lm

TRAIN = Context(train=True)
RNG = np.random.default_rng(0)
LOGITS = 2 * RNG.standard_normal((2, 5, 7), np.float32)
TARGETS = RNG.integers(0, 7, 5)


def kl(a, b):
    return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)


def jensen_shannon(p, q, beta=0.3):
    m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def decoupled(p, q, alpha=1.5, beta=4.0):
    """Zhao et al. by probabilities, the target taken out row by row."""
    rows = []
    for lp, lq, t in zip(p, q, TARGETS, strict=True):
        keep = [i for i in range(len(lp)) if i != t]
        a, b = lp.exp(), lq.exp()
        two = kl(torch.stack([a[t], a[keep].sum()]).log(), torch.stack([b[t], b[keep].sum()]).log())
        rest = kl((a[keep] / a[keep].sum()).log(), (b[keep] / b[keep].sum()).log())
        rows.append(alpha * two + beta * rest)
    return torch.stack(rows)


def uld(p, q):
    """Boizard et al.: probabilities by rank, whatever tokens they belong to."""
    a, b = (x.exp().sort(dim=-1, descending=True).values for x in (p, q))
    size = max(a.shape[-1], b.shape[-1])
    a, b = (F.pad(x, (0, size - x.shape[-1])) for x in (a, b))
    return torch.stack([(x - y).abs().sum() for x, y in zip(a, b, strict=True)])


REFERENCES = {
    "uld": (divergences.uld, uld),
    "forward_kl": (divergences.forward_kl, kl),
    "reverse_kl": (divergences.reverse_kl, lambda p, q: kl(q, p)),
    "jensen_shannon": (divergences.jensen_shannon(0.3), jensen_shannon),
    "total_variation": (divergences.total_variation, lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2),
    "decoupled": (lambda p, q: divergences.decoupled(p, q, jnp.asarray(TARGETS), 1.5, 4.0), decoupled),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_divergences_equal_torch(name):
    ours, theirs = REFERENCES[name]
    teacher, student = LOGITS
    t = torch.tensor(student, requires_grad=True)
    want = theirs(F.log_softmax(torch.tensor(teacher), -1), F.log_softmax(t, -1))
    want.sum().backward()
    log_p = jax.nn.log_softmax(teacher)
    got, back = jax.vjp(lambda x: ours(log_p, jax.nn.log_softmax(x)), jnp.asarray(student))
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(back(jnp.ones_like(got))[0], t.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(4, 7), (7, 4)])
def test_uld_of_two_vocabularies_equals_torch(n, m):
    teacher, student = LOGITS[0][:, :n], LOGITS[1][:, :m]
    t = torch.tensor(student, requires_grad=True)
    want = uld(F.log_softmax(torch.tensor(teacher), -1), F.log_softmax(t, -1))
    want.sum().backward()
    got, back = jax.vjp(lambda x: divergences.uld(jax.nn.log_softmax(teacher), jax.nn.log_softmax(x)), student)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(back(jnp.ones_like(got))[0], t.grad.numpy(), atol=1e-5)


def test_uld_does_not_ask_which_token():
    log_p = jax.nn.log_softmax(LOGITS[0])
    np.testing.assert_allclose(divergences.uld(log_p, log_p[:, ::-1]), 0, atol=1e-6)


def test_a_teacher_of_another_tokenizer_is_compared_where_it_stands():
    """The teacher reads rows of its own; a position of the student's without a partner counts for nothing."""
    m, p = tiny.model(), tiny.params()
    wide = dataclasses.replace(tiny.LLAMA, vocab_size=40)
    t, q = tiny.model(wide), tiny.params(wide)
    rows = trains.rows()
    own = RNG.integers(1, 40, (4, 12)).astype(np.int32)
    mask = (np.arange(12) < np.array([[12], [9], [7], [0]])).astype(np.int32)
    at = np.zeros((4, 8), np.int32)
    at[0, [1, 4, 7]], at[1, 2], at[2, [0, 7]] = [1, 5, 12], 9, [3, 7]
    more = {"teacher_tokens": own * mask, "teacher_mask": mask, "teacher_at": at}
    objective = distill.make(causal_lm.make(), t, q, distill.Options(alpha=0.5, divergence="uld", chunk_size=3))
    loss, weight, metrics = objective.loss(m, p, objective.frozen, {**rows, **more}, TRAIN)
    student = jax.nn.log_softmax(m.logits(p, m.hidden(p, rows)[0]))
    want = 0.0
    for r, i in zip(*np.nonzero(at), strict=True):
        # A row by itself, as far as the position that is read.
        seen = own[r : r + 1, : at[r, i]]
        log_p = jax.nn.log_softmax(t.logits(q, t.hidden(q, {"tokens": seen})[0])[:, -1])
        want += uld(torch.tensor(np.asarray(log_p)), torch.tensor(np.asarray(student[r, i])[None])).item()
    np.testing.assert_allclose(metrics["soft"], want, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * metrics["hard"] + 0.5 * metrics["soft"], rtol=1e-6)
    assert float(weight) == 32


def test_decoupled_is_the_forward_kl_of_its_weights():
    log_p, log_q = jax.nn.log_softmax(LOGITS)
    rest = 1 - np.exp(np.take_along_axis(np.asarray(log_p), TARGETS[:, None], -1))[:, 0]
    parts = [divergences.decoupled(log_p, log_q, jnp.asarray(TARGETS), *w) for w in ((1.0, 0.0), (0.0, 1.0))]
    np.testing.assert_allclose(parts[0] + rest * parts[1], divergences.forward_kl(log_p, log_q), atol=1e-6)


def whole(options, x_s, x_t, targets, weights):
    """Hinton's mix by torch, summed: logits [batch, length, vocab]."""
    s, t, w = torch.tensor(x_s, requires_grad=True), torch.tensor(x_t), torch.tensor(weights)
    hard = F.cross_entropy(s.flatten(0, 1), torch.tensor(targets).long().flatten(), reduction="none").reshape(w.shape)
    soft = kl(F.log_softmax(t / options.temperature, -1), F.log_softmax(s / options.temperature, -1))
    loss = (w * (options.alpha * hard + (1 - options.alpha) * options.temperature**2 * soft)).sum()
    loss.backward()
    return loss.item(), s.grad.numpy()


def table():
    """A model whose parameters are its logits, so that their gradient is the gradient to the logits."""
    return tiny.model()._replace(
        hidden=lambda params, batch, **_: (params["logits"], {}), head=lambda params: {}, logits=lambda head, x: x
    )


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_mix_and_its_gradient_equal_torch(alpha, chunk_size):
    x_s, x_t = 2 * np.random.default_rng(1).standard_normal((2, 4, 8, 31), np.float32)
    options = distill.Options(alpha=alpha, temperature=2.0, chunk_size=chunk_size)
    objective = distill.make(causal_lm.make(), table(), {"logits": x_t}, options)
    batch = {**trains.rows(), "loss_weights": RNG.uniform(0, 1, (4, 8)).astype(np.float32)}

    def total(params):
        return objective.loss(table(), params, objective.frozen, batch, TRAIN)[0]

    want, slope = whole(options, x_s, x_t, batch["targets"], batch["loss_weights"])
    got, grads = jax.value_and_grad(total)({"logits": jnp.asarray(x_s)})
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(grads["logits"], slope, atol=1e-5)


def test_gradients_of_parameters_do_not_depend_on_the_chunk():
    student, params = tiny.model(), tiny.params()
    teacher = jax.tree.map(lambda x: 1.3 * x, params)
    batch = trains.rows()

    def grads(chunk_size):
        options = distill.Options(temperature=2.0, divergence="reverse_kl", chunk_size=chunk_size)
        objective = distill.make(causal_lm.make(), student, teacher, options)
        return jax.grad(lambda p: objective.loss(student, p, objective.frozen, batch, TRAIN)[0])(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads(3), grads(8))


def test_a_teacher_like_the_student_teaches_nothing_and_gets_no_gradient():
    m, p = tiny.model(), tiny.params()
    objective = distill.make(causal_lm.make(), m, p, distill.Options(alpha=0.0, temperature=3.0))

    def total(params, frozen):
        return objective.loss(m, params, frozen, trains.rows(), TRAIN)[0]

    loss, (to_student, to_teacher) = jax.value_and_grad(total, argnums=(0, 1))(p, objective.frozen)
    np.testing.assert_allclose(loss, 0, atol=1e-5)
    assert max(np.abs(x).max() for x in jax.tree.leaves(to_student)) < 1e-4
    assert all(not x.any() for x in jax.tree.leaves(to_teacher))


def test_masked_tokens_are_the_same_for_the_teacher():
    m, p = tiny.model(tiny.BERT, "mlm"), tiny.params(tiny.BERT, "mlm")
    seen = []

    def spied(params, batch, **options):
        seen.append(np.asarray(batch["tokens"]))
        return m.hidden(params, batch, **options)

    spy = m._replace(hidden=spied)
    objective = distill.make(masked_lm.make(mask_token_id=30, mlm_probability=0.5), spy, p, distill.Options())
    objective.loss(spy, p, objective.frozen, trains.rows(), Context(0, jax.random.key(1), True))
    assert len(seen) == 2
    assert np.array_equal(*seen)
    assert (seen[0] == 30).any()


def test_labels_are_distilled_at_the_labelled_position():
    m, p = tiny.model(tiny.BERT, "classification"), tiny.params(tiny.BERT, "classification")
    other = jax.tree.map(lambda x: 1.2 * x, p)
    batch = trains.rows()
    batch["loss_weights"] = np.zeros((4, 8), np.float32)
    batch["loss_weights"][:, 0] = 1
    batch["targets"] = np.tile(np.arange(4, dtype=np.int32)[:, None] % 3, (1, 8))
    objective = distill.make(classification.make(), m, other, distill.Options(alpha=0.0))
    loss, weight, metrics = objective.loss(m, p, objective.frozen, batch, TRAIN)
    x, y = (torch.tensor(np.asarray(m.logits(q, m.hidden(q, batch)[0])[:, 0])) for q in (p, other))
    np.testing.assert_allclose(loss, kl(F.log_softmax(y, -1), F.log_softmax(x, -1)).sum().item(), rtol=1e-5)
    assert float(weight) == 4
    assert {"hard", "soft", "accuracy"} <= set(metrics)
    alone = classification.make().loss(m, p, {}, batch, Context())
    jax.tree.map(np.testing.assert_array_equal, objective.loss(m, p, objective.frozen, batch, Context()), alone)
    assert "matthews" in objective.scores({"confusion": np.eye(3)})


def labelled_rows():
    batch = trains.rows()
    batch["loss_weights"] = np.zeros((4, 8), np.float32)
    batch["loss_weights"][:, 0] = 1
    batch["targets"] = np.tile(np.array([[0], [1], [2], [1]], np.int32), (1, 8))
    return batch


@pytest.mark.parametrize("class_weights", [(1.0, 1.0, 1.0), (10.0, 10.0, 10.0), (3.0, 0.5, 1.0)])
def test_class_weights_weigh_the_teachers_part_as_the_objectives(class_weights):
    """All of it is torch's weighted mean: a factor on all classes changes nothing."""
    m, p = tiny.model(tiny.BERT, "classification"), tiny.params(tiny.BERT, "classification")
    other, batch = jax.tree.map(lambda x: 1.2 * x, p), labelled_rows()
    depth = tiny.BERT.num_layers
    term = features.hidden(depth, depth, weight=0.5, layers="last")
    made = classification.make(class_weights=class_weights)
    objective = distill.make(made, m, other, distill.Options(alpha=0.25), (term,))
    loss, weight, metrics = objective.loss(m, p, objective.frozen, batch, TRAIN)
    (x, a), (y, b) = ((m.hidden(q, batch, taps=("hidden",))) for q in (p, other))
    labels = torch.tensor(batch["targets"][:, 0]).long()
    student, teacher = (torch.tensor(np.asarray(m.logits(q, h[:, 0]))) for q, h in ((p, x), (other, y)))
    c = torch.tensor(class_weights)
    hard = F.cross_entropy(student, labels, weight=c)
    soft = (c[labels] * kl(F.log_softmax(teacher, -1), F.log_softmax(student, -1))).sum() / c[labels].sum()
    apart = torch.tensor(np.square(np.asarray(a["hidden"][-1] - b["hidden"][-1])).mean((1, 2)))
    apart = (c[labels] * apart).sum() / c[labels].sum()
    for name, want in (("hard", hard), ("soft", soft), ("hidden", apart)):
        np.testing.assert_allclose(metrics[name] / weight, want.item(), rtol=1e-5)
    np.testing.assert_allclose(loss / weight, (0.25 * hard + 0.75 * soft + 0.5 * apart).item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"divergence": "forward_lk"}, "forward_kl"),
        ({"divergence": "jensen_shannon", "beta": 1.0}, "beta is 1.0"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(errors.ConfigError, match=says):
        distill.make(causal_lm.make(), tiny.model(), {}, distill.Options(**options))


def test_another_vocabulary_is_refused():
    m, p = tiny.model(), tiny.params()
    wider = m._replace(logits=lambda head, x: jnp.pad(m.logits(head, x), [(0, 0)] * (x.ndim - 1) + [(0, 2)]))
    objective = distill.make(causal_lm.make(), wider, p)
    with pytest.raises(errors.ConfigError, match="31 tokens or labels apart and the teacher 33"):
        objective.loss(m, p, objective.frozen, trains.rows(), TRAIN)


def test_memory_hardly_grows_with_the_vocabulary():
    """What a step needs beside its arguments, for vocabularies of which one batch of logits is far over a chunk."""

    def needed(vocab):
        config = dataclasses.replace(tiny.LLAMA, vocab_size=vocab, max_positions=256)
        teacher = build.build(dataclasses.replace(config, num_layers=4, embed_dim=32), head="lm")
        frozen = jax.eval_shape(teacher.init, jax.random.key(0))
        model = build.build(config, head="lm")
        objective = distill.make(causal_lm.make(), teacher, frozen, distill.Options(temperature=2.0))
        params = jax.eval_shape(model.init, jax.random.key(0))
        method = registry.build({"name": "lora", "rank": 2})
        start = jax.eval_shape(method.init, jax.random.key(0), params)
        batch = {k: jax.ShapeDtypeStruct((8, 256), x.dtype) for k, x in trains.rows().items()}

        def loss(train, state, params, frozen, batch):
            bound = method.bind(params, train, state, Context())
            return objective.loss(model, bound, frozen, batch, TRAIN)[0]

        compiled = jax.jit(jax.grad(loss)).lower(start.train, start.state, params, objective.frozen, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = needed(16_000), needed(32_000)
    assert large < 4 * 8 * 256 * 32_000  # not even one such array, of the two that a naive loss has
    assert large < 1.2 * small
