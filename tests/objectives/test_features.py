"""Distillation of features against torch, an example at a time: losses to 1e-6, gradients to 1e-5."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import trains

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import test_matrix

from tunejax.core import errors
from tunejax.core.method import Context, apply_edits
from tunejax.core.model import AUXILIARY
from tunejax.methods import registry
from tunejax.objectives import causal_lm, distill, features, masked_lm
from tunejax.train import optimizer, sharding, step

TRAIN = Context(train=True)
RNG = np.random.default_rng(5)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]], np.int32)
WEIGHTS = np.where(SEGMENTS > 0, RNG.uniform(0.5, 1.5, SEGMENTS.shape), 0).astype(np.float32)
WEIGHTS[0, 0] = 0
BATCH = {
    "tokens": np.where(SEGMENTS > 0, RNG.integers(1, 31, SEGMENTS.shape), 0).astype(np.int32),
    "positions": POSITIONS,
    "segment_ids": SEGMENTS,
    "loss_weights": WEIGHTS,
}
EXAMPLES = [(0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 6))]


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def compare(term, student, teacher, reference, *, causal=True, kernels=None, batch=BATCH):
    """A term and its gradients beside ``reference(student, teacher, kernels)`` of double tensors by name."""
    model = tiny.model() if causal else tiny.model(tiny.BERT, "mlm")

    def ours(student, kernels):
        output = jnp.zeros(()), jnp.ones(()), {}
        return features.added(output, (term,), model, {AUXILIARY: kernels}, batch, student, teacher)[0]

    kernels = kernels or {}
    got, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(student, kernels)
    s, k = ({n: torch.tensor(x, dtype=torch.float64, requires_grad=True) for n, x in d.items()}
            for d in (student, {n: x["kernel"] for n, x in kernels.items()}))  # fmt: skip
    want = term.weight * reference(s, {n: torch.tensor(x, dtype=torch.float64) for n, x in teacher.items()}, k)
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    for name, x in s.items():
        np.testing.assert_allclose(grads[0][name], x.grad.numpy(), atol=1e-5)
    for name, x in k.items():
        np.testing.assert_allclose(grads[1][name]["kernel"], x.grad.numpy(), atol=1e-5)


def over_examples(distance):
    """Sum of each example's weight times its mean distance over tokens. distance: ([t, n], [t, n]) -> [t]."""

    def total(student, teacher, pairs):
        loss = 0.0
        for row, part in EXAMPLES:
            weight = float(WEIGHTS[row, part].sum())
            loss = loss + sum(weight * distance(student[i][row, part], teacher[j][row, part]).mean() for i, j in pairs)
        return loss

    return total


DISTANCES = {
    "mse": lambda x, y: torch.stack([F.mse_loss(a, b) for a, b in zip(x, y, strict=True)]),
    "cosine": lambda x, y: F.cosine_embedding_loss(x, y, torch.ones(len(x)), reduction="none"),
    "normalized_mse": lambda x, y: ((x / x.norm(dim=-1, keepdim=True) - y / y.norm(dim=-1, keepdim=True)) ** 2).sum(-1),
}


@pytest.mark.parametrize("metric", DISTANCES)
def test_hidden_states_equal_torch(metric):
    student, teacher = draw(2, 3, 6, 8), draw(4, 3, 6, 8)
    total = over_examples(DISTANCES[metric])
    compare(
        features.hidden(2, 4, weight=0.7, metric=metric),
        {"hidden": student},
        {"hidden": teacher},
        lambda s, t, k: total(s["hidden"], t["hidden"], [(0, 1), (1, 3)]),
    )


def test_projections_and_embeddings_equal_torch():
    student = {"hidden": draw(2, 3, 6, 4), "embedding": draw(1, 3, 6, 4)}
    teacher = {"hidden": draw(3, 3, 6, 8), "embedding": draw(1, 3, 6, 8)}
    kernels = {name: {"kernel": draw(4, 8)} for name in student}
    total = over_examples(DISTANCES["mse"])
    compare(
        features.hidden(2, 3, layers=[(0, 1), (-1, -1)], embeddings=True),
        student,
        teacher,
        lambda s, t, k: (
            total(s["hidden"] @ k["hidden"], t["hidden"], [(0, 1), (1, 2)])
            + total(s["embedding"] @ k["embedding"], t["embedding"], [(0, 0)])
        ),
        kernels=kernels,
    )


def relation(a, b, heads, causal):
    """Log-probabilities [heads, t, t] of one example. a, b: [t, heads, width], cut anew where heads are named."""
    b = b.repeat_interleave(a.shape[1] // b.shape[1], dim=1)
    if heads is not None:
        a, b = (x.flatten(1).reshape(len(x), heads, -1) for x in (a, b))
    scores = torch.stack([a[:, h] @ b[:, h].T / a.shape[-1] ** 0.5 for h in range(a.shape[1])])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return scores.log_softmax(-1)


def kl_of_relations(s, t, heads, causal):
    """KL(teacher || student) a query, mean over heads: [t]. s, t: pairs of what is multiplied."""
    log_q, log_p = relation(*s, heads, causal), relation(*t, heads, causal)
    parts = torch.where(log_p.isinf(), 0, log_p.exp() * (log_p - log_q.masked_fill(log_q.isinf(), 0)))
    return parts.sum(-1).mean(0)


def reference_of(of, heads, causal, layers):
    sides = {"attention": ("query", "key"), "query": ("query",) * 2, "key": ("key",) * 2, "value": ("value",) * 2}

    def total(s, t, _):
        loss = 0.0
        for row, part in EXAMPLES:
            weight = float(WEIGHTS[row, part].sum())
            for name in of:
                ours, theirs = ([x[n][i, row, part] for n in sides[name]] for x, i in zip((s, t), layers, strict=True))
                loss = loss + weight * kl_of_relations(ours, theirs, heads, causal).mean()
        return loss

    return total


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("of", "heads"),
    [(("attention", "value"), None), (("query", "key", "value"), 8)],
    ids=["MiniLM", "MiniLMv2"],
)
def test_relations_equal_torch(of, heads, causal):
    """v1 with as many heads of another width; v2 with other heads, widths and grouped keys on both sides."""
    if heads is None:
        student = {"query": draw(2, 3, 6, 4, 3), "key": draw(2, 3, 6, 2, 3), "value": draw(2, 3, 6, 4, 3)}
        teacher = {"query": draw(3, 3, 6, 4, 8), "key": draw(3, 3, 6, 4, 8), "value": draw(3, 3, 6, 4, 8)}
    else:
        student = {"query": draw(2, 3, 6, 2, 8), "key": draw(2, 3, 6, 2, 8), "value": draw(2, 3, 6, 1, 8)}
        teacher = {"query": draw(3, 3, 6, 6, 4), "key": draw(3, 3, 6, 2, 4), "value": draw(3, 3, 6, 2, 4)}
    term = features.relations(2, 3, of=of, heads=heads, weight=1.3, teacher_layer=1)
    used = {n: student[n] for n in term.taps}
    compare(term, used, {n: teacher[n] for n in term.taps}, reference_of(of, heads, causal, (1, 1)), causal=causal)


def test_virtual_tokens_count_for_nothing():
    """Those of a soft prompt stand in the student's row alone: what the taps hold there does not matter."""
    tokens = BATCH["tokens"].copy()
    tokens[1, :2] = [31, 32]
    term = features.relations(1, 1, of=("value",))
    teacher = {"value": draw(1, 3, 6, 2, 4)}

    def loss(student):
        output = jnp.zeros(()), jnp.ones(()), {}
        batch = {**BATCH, "tokens": tokens}
        return features.added(output, (term,), tiny.model(), {}, batch, {"value": student}, teacher)[0]

    x = draw(1, 3, 6, 2, 4)
    slope = jax.grad(loss)(x)
    assert not slope[0, 1, :2].any()
    assert slope[0, 1, 2:].any()
    want = np.zeros(SEGMENTS.shape, np.float32)
    want[0, :3], want[0, 3:5], want[1, 2:] = WEIGHTS[0, :3].sum() / 3, WEIGHTS[0, 3:5].sum() / 2, WEIGHTS[1].sum() / 4
    np.testing.assert_allclose(features.spread({**BATCH, "tokens": tokens}, 31), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "want"),
    [(6, 12, [1, 3, 5, 7, 9, 11]), (4, 12, [2, 5, 8, 11]), (3, 3, [0, 1, 2]), (2, 3, [1, 2]), (4, 2, [0, 0, 1, 1])],
)
def test_uniform_pairs(student, teacher, want):
    """TinyBERT's g(m) = m N / M from 1, the nearest layer where that is none; the last is the last."""
    assert features.pairs("uniform", student, teacher) == tuple(enumerate(want))
    assert features.pairs("last", student, teacher) == ((student - 1, teacher - 1),)


def summed(model, p, rows):
    """Logits and taps of a model, as tensors."""
    hidden, aux = model.hidden(p, rows, taps=("hidden",))
    return (torch.tensor(np.asarray(x)).double() for x in (model.logits(p, hidden), aux["hidden"]))


def test_distilberts_triple_loss_is_a_combination():
    """5 KL at temperature 2, 2 cross-entropy of hidden tokens, 1 cosine of the last hidden states (their weights)."""
    m, p = tiny.model(tiny.BERT, "mlm"), tiny.params(tiny.BERT, "mlm")
    deep = dataclasses.replace(tiny.BERT, num_layers=4)
    t, q = tiny.model(deep, "mlm"), tiny.params(deep, "mlm")
    rows = trains.rows()
    rows["loss_weights"] = (RNG.uniform(size=(4, 8)) < 0.4).astype(np.float32)
    # alpha 2 and (1 - alpha) logits 5, so the soft part's factor is 5 / (1 - alpha) after all is divided by 7.
    options = distill.Options(alpha=2 / 7, logits=1.0, temperature=2.0)
    terms = (features.hidden(3, 4, weight=1 / 7, layers="last", metric="cosine"),)
    objective = distill.make(masked_lm.make(), t, q, options, terms)
    loss, weight, metrics = objective.loss(m, p, objective.frozen, rows, TRAIN)
    (x, h), (y, g) = summed(m, p, rows), summed(t, q, rows)
    at = torch.tensor(rows["loss_weights"]) > 0
    soft = F.kl_div((x[at] / 2).log_softmax(-1), (y[at] / 2).softmax(-1), reduction="sum") * 4
    hard = F.cross_entropy(x[at], torch.tensor(rows["targets"])[at].long(), reduction="sum")
    similar = F.cosine_embedding_loss(h[-1].flatten(0, 1), g[-1].flatten(0, 1), torch.ones(32), reduction="none")
    cosine = (similar.reshape(4, 8).mean(1) * at.sum(1)).sum()
    np.testing.assert_allclose(loss, ((5 * soft + 2 * hard + cosine) / 7).item(), rtol=1e-6)
    np.testing.assert_allclose([metrics["hidden"], metrics["soft"], metrics["hard"]], [cosine, soft, hard], rtol=1e-6)
    assert float(weight) == at.sum()


def test_features_alone_teach():
    """logits 0 leaves the divergence out; heads, widths and a deeper teacher do not matter to relations."""
    wide = dataclasses.replace(tiny.LLAMA, num_layers=4, embed_dim=32, num_heads=8, vocab_size=40)
    m, p, t, q = tiny.model(), tiny.params(), tiny.model(wide), tiny.params(wide)
    terms = (features.relations(3, 4, heads=4, of=("query", "value")),)
    wrong = distill.make(causal_lm.make(), t, q, distill.Options(alpha=0.0), terms)
    with pytest.raises(errors.ConfigError, match="31 tokens or labels apart and the teacher 40"):
        wrong.loss(m, p, wrong.frozen, trains.rows(), TRAIN)
    alone = distill.make(causal_lm.make(), t, q, distill.Options(alpha=0.0, logits=0.0), terms)
    loss, _, metrics = alone.loss(m, p, alone.frozen, trains.rows(), TRAIN)
    assert "soft" not in metrics
    np.testing.assert_allclose(loss, metrics["relations"])
    assert float(loss) > 0


def towards_a_wider(method):
    """(method beside projections, their sizes, an objective with a wider teacher)."""
    wide = dataclasses.replace(tiny.LLAMA, embed_dim=24, num_layers=4)
    sizes = {"hidden": (16, 24)}
    terms = (features.hidden(3, 4), features.relations(3, 4, heads=2))
    objective = distill.make(causal_lm.make(), tiny.model(wide), tiny.params(wide), distill.Options(), terms)
    return features.beside(method, sizes), sizes, objective


def test_projections_train_beside_a_method():
    lora = registry.build({"name": "lora", "rank": 2})
    method, sizes, objective = towards_a_wider(lora)
    _, s, base, batch = trains.begin(method)
    tuner = optimizer.make_optimizer("adamw", 1e-2)
    one = step.make_step(tiny.model(), method, objective, tuner, mesh=sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
    before, losses = jax.tree.map(np.array, s.train), []
    for _ in range(4):
        s, metrics = one(s, base, objective.frozen, batch)
        losses.append(float(metrics["hidden"]))
    assert losses[-1] < losses[0]
    name = "1:projections"
    assert s.train[name]["hidden"]["kernel"].shape == (16, 24)
    assert np.abs(np.asarray(s.train[name]["hidden"]["kernel"]) - before[name]["hidden"]["kernel"]).max() > 1e-3
    own = features.own(lora, sizes, s.train)
    merged = method.merge(base, s.train, s.state)
    assert AUXILIARY not in merged
    alone = lora.bind(base, own, features.own(lora, sizes, s.state), Context())
    np.testing.assert_allclose(tiny.outputs(tiny.model(), merged), tiny.outputs(tiny.model(), alone), atol=1e-5)


@pytest.mark.parametrize("name", ["full", "prompt_tuning", "fish", "lst", "adapter_fusion", "many", "shrunk"])
def test_methods_of_every_kind_have_gradients_beside_projections(name):
    """Traced, not run: what depends on the method is how its tree and its bound parameters are taken apart."""
    config = dataclasses.replace(tiny.LLAMA, num_layers=test_matrix.DEPTH.get(name, 3))
    spec = (
        test_matrix.fused(config) if name == "adapter_fusion" else {**test_matrix.SPECS, **test_matrix.VARIANTS}[name]
    )
    tuned = registry.build(spec)
    method, sizes, objective = towards_a_wider(tuned)
    model = tiny.model(config, "lm", method.cuts(config.num_layers))
    params = tiny.params(config, "lm", method.cuts(config.num_layers))

    def slopes(params):
        start = method.init(jax.random.key(0), params)
        base = apply_edits(params, start.edits)

        def total(train):
            bound = method.bind(base, train, start.state, Context())
            return objective.loss(model, bound, objective.frozen, trains.rows(prompt=method.prompt), TRAIN)[0]

        return start, jax.grad(total)(start.train)

    start, found = jax.eval_shape(slopes, params)
    assert jax.tree.structure(found) == jax.tree.structure(start.train)
    alone = jax.eval_shape(tuned.init, jax.random.key(0), params)
    for tree in ("train", "state"):
        shapes = jax.tree.map(jnp.shape, (features.own(tuned, sizes, getattr(start, tree)), getattr(alone, tree)))
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: features.hidden(2, 4, metric="cosin"), "cosine"),
        (lambda: features.hidden(2, 4, layers="unifrm"), "uniform"),
        (lambda: features.hidden(2, 4, layers=[(2, 0)]), "layer 2 of the student, which has 2"),
        (lambda: features.relations(2, 4, teacher_layer=-5), "layer -5 of the teacher, which has 4"),
        (lambda: features.relations(2, 4, of=("values",)), "Did you mean 'value'"),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(errors.ConfigError, match=says):
        make()


@pytest.mark.parametrize(
    ("term", "student", "teacher", "says"),
    [
        (features.hidden(1, 1), draw(1, 3, 6, 4), draw(1, 3, 6, 8), "a width of 4 with the teacher's 8"),
        (features.relations(1, 1, of=("value",)), draw(1, 3, 6, 2, 4), draw(1, 3, 6, 4, 4), "2 heads .* teacher's 4"),
        (features.relations(1, 1, of=("value",), heads=3), draw(1, 3, 6, 2, 4), draw(1, 3, 6, 3, 4), "heads is 3"),
    ],
)
def test_shapes_that_do_not_fit(term, student, teacher, says):
    (name,) = term.taps
    with pytest.raises(errors.ConfigError, match=says):
        features.added(
            (jnp.zeros(()), jnp.ones(()), {}), (term,), tiny.model(), {}, BATCH, {name: student}, {name: teacher}
        )
