"""The objectives on a bag-of-embeddings model, against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.core import errors
from tunejax.core import method as method_lib
from tunejax.core import model as model_lib
from tunejax.objectives import causal_lm, classification, cloze, masked_lm

torch = pytest.importorskip("torch")
VOCAB, EMBED, LABELS = 50, 8, 3
EVAL, TRAIN = method_lib.Context(), method_lib.Context(key=jax.random.key(3), train=True)


def toy(outputs):
    k = jax.random.split(jax.random.key(0), 2)
    params = {"table": jax.random.normal(k[0], (VOCAB, EMBED)), "head": jax.random.normal(k[1], (EMBED, outputs))}
    model = model_lib.Model(
        init=lambda key: params,
        hidden=lambda p, batch, *, cache=None, taps=(), key=None: (p["table"][batch["tokens"]], {}),
        head=lambda p: {"head": p["head"]},
        logits=lambda p, h: h @ p["head"],
        cache=None,
        axes={},
        vocab_size=VOCAB,
        depth=0,
    )
    return model, params


def batch(rows=6, length=9):
    rng = np.random.default_rng(0)
    segments = (np.arange(length) < rng.integers(4, length + 1, rows)[:, None]).astype(np.int32)
    return {
        "tokens": jnp.asarray(rng.integers(5, VOCAB, (rows, length)) * segments, jnp.int32),
        "targets": jnp.asarray(rng.integers(0, VOCAB, (rows, length)), jnp.int32),
        "loss_weights": jnp.asarray(segments * rng.random((rows, length)), jnp.float32),
        "segment_ids": jnp.asarray(segments),
    }


def to_torch(x):
    return torch.tensor(np.asarray(x))


def test_causal_lm():
    model, params = toy(VOCAB)
    b = batch()
    loss, weight, metrics = causal_lm.make(label_smoothing=0.1, chunk_size=4).loss(model, params, {}, b, EVAL)
    logits = to_torch(model.logits(params, model.hidden(params, b)[0]))
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), to_torch(b["targets"]).long(), reduction="none",
                                               label_smoothing=0.1)  # fmt: skip
    np.testing.assert_allclose(loss, (losses * to_torch(b["loss_weights"])).sum(), rtol=1e-6)
    np.testing.assert_allclose(weight, b["loss_weights"].sum(), rtol=1e-6)
    hits = (logits.argmax(-1) == to_torch(b["targets"])).numpy()
    np.testing.assert_allclose(metrics["accuracy"], (hits * np.asarray(b["loss_weights"])).sum(), rtol=1e-6)
    assert causal_lm.make(label_smoothing=0.1).loss(model, params, {}, b, TRAIN)[2] == {}


@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"z_loss": 0.01}])
def test_nll_is_cross_entropy_alone(options):
    model, params = toy(VOCAB)
    b = batch()
    logits = to_torch(model.logits(params, model.hidden(params, b)[0]))
    plain = torch.nn.functional.cross_entropy(logits.transpose(1, 2), to_torch(b["targets"]).long(), reduction="none")
    want = (plain * to_torch(b["loss_weights"])).sum()
    loss, _, metrics = causal_lm.make(**options, chunk_size=4).loss(model, params, {}, b, EVAL)
    np.testing.assert_allclose(metrics["nll"], want, rtol=1e-6)
    assert abs(float(loss) - float(want)) > 0.1
    assert set(causal_lm.make().loss(model, params, {}, b, EVAL)[2]) == {"accuracy"}


def test_classification_reads_the_labelled_position_and_ignores_empty_rows():
    model, params = toy(LABELS)
    b = batch()
    at, labels = np.array([0, 3, 2, 0, 1, 0]), np.array([0, 1, 2, 1, 0, 2])
    weights = np.zeros((6, 9), np.float32)
    weights[np.arange(5), at[:5]] = 1
    targets = np.full((6, 9), -100)
    targets[np.arange(6), at] = labels
    b |= {"loss_weights": jnp.asarray(weights), "targets": jnp.asarray(targets)}
    logits = to_torch(params["table"][b["tokens"]][np.arange(5), at[:5]] @ params["head"])
    for options in ({}, {"label_smoothing": 0.2}, {"class_weights": (1.0, 2.0, 0.5)},
                    {"class_weights": (1.0, 2.0, 0.5), "label_smoothing": 0.2}):  # fmt: skip
        loss, weight, metrics = classification.make(**options).loss(model, params, {}, b, TRAIN)
        kw = {"label_smoothing": options.get("label_smoothing", 0.0)}
        if "class_weights" in options:
            kw["weight"] = torch.tensor(options["class_weights"])
        want = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[:5]), **kw)
        np.testing.assert_allclose(loss / weight, want, rtol=1e-6)
        right, of = metrics["accuracy"]
        assert (float(right), float(of)) == (float((logits.argmax(-1).numpy() == labels[:5]).sum()), 5.0)


def test_a_label_that_is_no_class_is_not_taken_for_another():
    model, params = toy(LABELS)
    weights = np.zeros((6, 9), np.float32)
    weights[0, 0] = 1
    b = batch() | {"loss_weights": jnp.asarray(weights), "targets": jnp.full((6, 9), LABELS)}
    assert np.isnan(classification.make().loss(model, params, {}, b, EVAL)[0])


def test_a_cloze_compares_the_labels_words_alone():
    model, params = toy(VOCAB)
    b = batch()
    words, labels, at = [5, 2, 7], np.array([0, 1, 2, 1, 0, 2]), np.array([1, 3, 2, 0, 4, 8])
    targets, weights = np.zeros((6, 9), np.int32), np.zeros((6, 9), np.float32)
    targets[np.arange(6), at], weights[np.arange(5), at[:5]] = labels, 1  # the last row is empty
    b |= {"targets": jnp.asarray(targets), "loss_weights": jnp.asarray(weights)}
    logits = to_torch(params["table"][b["tokens"]][np.arange(5), at[:5]] @ params["head"])[:, words]
    objective = cloze.make(verbalizer=dict(zip("abc", words, strict=True)))
    loss, weight, metrics = objective.loss(model, params, {}, b, EVAL)
    np.testing.assert_allclose(loss / weight, torch.nn.functional.cross_entropy(logits, torch.tensor(labels[:5])),
                               rtol=1e-6)  # fmt: skip
    assert float(metrics["accuracy"][0]) == (logits.argmax(-1).numpy() == labels[:5]).sum()
    assert set(objective.scores({k: total / of for k, (total, of) in metrics.items()})) == {"accuracy", "matthews"}


@pytest.mark.parametrize("labels", [2, 3])
def test_matthews_is_the_correlation_of_labels_and_predictions(labels):
    model, params = toy(labels)
    rng = np.random.default_rng(labels)
    objective = classification.make()
    totals, true, said = None, [], []
    for i in range(3):
        weights = np.zeros((20, 9), np.float32)
        weights[: 20 - i, 0] = 1
        tokens, targets = rng.integers(0, VOCAB, (20, 9)), rng.integers(0, labels, (20, 9))
        logits = np.asarray(params["table"])[tokens[:, 0]] @ np.asarray(params["head"])
        targets[:10, 0] = logits.argmax(-1)[:10]
        b = {**batch(20), "tokens": tokens, "targets": targets, "loss_weights": weights}
        found = objective.loss(model, params, {}, b, EVAL)[2]
        totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
        true.append(targets[: 20 - i, 0])
        said.append(logits.argmax(-1)[: 20 - i])
    scores = objective.scores({name: total / weight for name, (total, weight) in totals.items()})
    x, y = (np.eye(labels)[np.concatenate(k)] for k in (true, said))
    x, y = x - x.mean(0), y - y.mean(0)
    want = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert 0.1 < want < 0.9
    np.testing.assert_allclose(scores["matthews"], want, rtol=1e-5)
    if labels == 2:
        np.testing.assert_allclose(want, np.corrcoef(np.concatenate(true), np.concatenate(said))[0, 1])
    assert set(scores) == {"accuracy", "matthews"}
    assert "confusion" not in objective.loss(model, params, {}, b, TRAIN)[2]


def test_matthews_of_one_answer_is_zero():
    assert classification.matthews(np.array([[3.0, 0.0], [2.0, 0.0]])) == 0.0


def test_masking_in_the_program():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, VOCAB, (64, 200)).astype(np.int32)
    tokens[:, 0] = 2
    segments = np.ones_like(tokens)
    segments[:, 150:] = 0
    b = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments)}
    out = jax.device_get(masked_lm.hide(jax.random.key(1), b, 4, VOCAB, 0.15, (2,)))
    hidden = out["loss_weights"] > 0
    assert not hidden[:, 0].any()
    assert not hidden[:, 150:].any()
    assert abs(hidden[:, 1:150].mean() - 0.15) < 0.01
    assert abs((out["tokens"] == 4)[hidden].mean() - 0.8) < 0.03
    assert abs((out["tokens"] == tokens)[hidden].mean() - 0.1) < 0.02
    np.testing.assert_array_equal(out["targets"], tokens)
    np.testing.assert_array_equal(out["tokens"][~hidden], tokens[~hidden])


def test_masked_lm_hides_anew_in_training_and_alike_in_evaluation():
    model, params = toy(VOCAB)
    objective = masked_lm.make(mask_token_id=4, special_token_ids=(0,))
    weight = lambda ctx: float(objective.loss(model, params, {}, batch(), ctx)[0])  # noqa: E731
    assert weight(EVAL) == weight(EVAL)
    assert weight(TRAIN) != weight(TRAIN._replace(key=jax.random.key(9)))
    ready = masked_lm.make().loss(model, params, {}, batch(), EVAL)
    np.testing.assert_allclose(ready[0], causal_lm.make().loss(model, params, {}, batch(), EVAL)[0], rtol=1e-6)


def test_what_evaluation_hides_of_a_text_is_its_own_matter():
    """Two texts in batches of other sizes, lengths and orders, packed, and behind virtual tokens."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, VOCAB, n).astype(np.int32) for n in (40, 25)]

    def hidden(rows, length):
        """What is shown and hidden of each text of ``rows``, which are lists of (text, virtual tokens before it)."""
        tokens, segments = np.zeros((2, len(rows), length), np.int32)
        where = []
        for r, pieces in enumerate(rows):
            at = 0
            for segment, (i, front) in enumerate(pieces, 1):
                piece = [VOCAB + 1] * front + texts[i].tolist()
                tokens[r, at : at + len(piece)], segments[r, at : at + len(piece)] = piece, segment
                where.append((i, r, slice(at + front, at + len(piece))))
                at += len(piece)
        b = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments)}
        hide = jax.jit(lambda b: masked_lm.hide(jax.random.key(1), b, 4, VOCAB, 0.5, (2,), by_content=True))
        out = jax.device_get(hide(b))
        return {i: (out["tokens"][r, at], out["loss_weights"][r, at]) for i, r, at in where}

    want = hidden([[(0, 0)], [(1, 0)]], 40)
    assert 8 < want[0][1].sum() < 32
    assert (want[0][0][:25] == 4).tolist() != (want[1][0] == 4).tolist()
    for rows, length in (([[(1, 0)], [(0, 0)], [], []], 64), ([[(0, 0), (1, 0)]], 70), ([[(1, 3), (0, 3)]], 80)):
        for i, found in hidden(rows, length).items():
            np.testing.assert_array_equal(found, want[i])


def test_masked_lm_hides_by_content_in_evaluation_as_often_as_in_training():
    tokens = np.random.default_rng(0).integers(5, VOCAB, (64, 200)).astype(np.int32)
    b = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.ones((64, 200), jnp.int32)}
    out = jax.device_get(masked_lm.hide(jax.random.key(1), b, 4, VOCAB, 0.15, by_content=True))
    hidden = out["loss_weights"] > 0
    assert abs(hidden.mean() - 0.15) < 0.01
    assert abs((out["tokens"] == 4)[hidden].mean() - 0.8) < 0.03
    assert abs((out["tokens"] == tokens)[hidden].mean() - 0.1) < 0.02
    assert len({row.tobytes() for row in hidden}) == 64


@pytest.mark.parametrize(("make", "options"), [
    (causal_lm.make, {"label_smoothing": 1.0}),
    (causal_lm.make, {"z_loss": -1.0}),
    (causal_lm.make, {"chunk_size": 0}),
    (masked_lm.make, {"mlm_probability": 0.0}),
    (classification.make, {"label_smoothing": -0.1}),
    (cloze.make, {"verbalizer": {"a": 3}}),
    (cloze.make, {"verbalizer": {"a": 3, "b": 3}}),
])  # fmt: skip
def test_options_out_of_range_are_named(make, options):
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        make(**options)


def test_virtual_tokens_are_neither_hidden_nor_predicted():
    tokens = jnp.concatenate([jnp.full((2, 9), VOCAB + 1), jnp.full((2, 400), 7)], axis=1)
    shown = masked_lm.hide(jax.random.key(0), {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}, 3, VOCAB, 0.9)
    np.testing.assert_array_equal(shown["tokens"][:, :9], VOCAB + 1)
    assert not shown["loss_weights"][:, :9].any()
    assert shown["loss_weights"][:, 9:].mean() > 0.8
    assert (shown["targets"] < VOCAB).all()
