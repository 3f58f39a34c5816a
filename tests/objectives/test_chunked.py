"""The chunked loss against torch and against the plain formula, and what it must not compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.objectives import chunked, cross_entropy

BATCH, LENGTH, EMBED, VOCAB = 3, 10, 8, 40


def inputs(dtype=jnp.float32):
    k = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(k[0], (BATCH, LENGTH, EMBED), dtype)
    head = {"kernel": jax.random.normal(k[1], (EMBED, VOCAB)) * 0.5, "bias": jnp.linspace(-1, 1, VOCAB)}
    targets = jax.random.randint(k[2], (BATCH, LENGTH), 0, VOCAB)
    weights = jax.random.uniform(k[3], (BATCH, LENGTH)) * (jnp.arange(LENGTH) > 2)
    return head, hidden, targets, weights


def logits(head, h):
    return h @ head["kernel"].astype(h.dtype) + head["bias"].astype(h.dtype)


def chunk_loss(head, hidden, targets, weights, **kw):
    return cross_entropy.over_positions(logits, head, hidden, targets, weights, vocab_size=VOCAB, **kw).loss


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 10])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch(chunk_size, smoothing):
    torch = pytest.importorskip("torch")
    head, hidden, targets, weights = inputs()
    t = {k: torch.tensor(np.asarray(x), requires_grad=True) for k, x in {**head, "hidden": hidden}.items()}
    out = t["hidden"] @ t["kernel"] + t["bias"]
    losses = torch.nn.functional.cross_entropy(
        out.reshape(-1, VOCAB), torch.tensor(np.asarray(targets).reshape(-1)).long(), reduction="none",
        label_smoothing=smoothing)  # fmt: skip
    want = (losses * torch.tensor(np.asarray(weights).reshape(-1))).sum()
    want.backward()
    got, (g_head, g_hidden) = jax.jit(jax.value_and_grad(chunk_loss, argnums=(0, 1)),
                                      static_argnames=("chunk_size", "label_smoothing"))(
        head, hidden, targets, weights, chunk_size=chunk_size, label_smoothing=smoothing)  # fmt: skip
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    np.testing.assert_allclose(g_hidden, t["hidden"].grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(g_head["kernel"], t["kernel"].grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(g_head["bias"], t["bias"].grad.numpy(), atol=1e-5)


def plain_loss(head, hidden, targets, weights, z_loss=0.0, label_smoothing=0.0):
    x = logits(head, hidden).astype(jnp.float32)
    logp = jax.nn.log_softmax(x)
    one_hot = jax.nn.one_hot(targets, VOCAB) * (1 - label_smoothing) + label_smoothing / VOCAB
    return jnp.sum(weights * (-jnp.sum(one_hot * logp, -1) + z_loss * jax.nn.logsumexp(x, -1) ** 2))


def test_equals_plain_with_every_option_and_weight_gradients():
    args, kw = inputs(), {"z_loss": 1e-2, "label_smoothing": 0.2}
    want = jax.grad(plain_loss, argnums=(0, 1, 3))(*args, **kw)
    got = jax.grad(chunk_loss, argnums=(0, 1, 3))(*args, chunk_size=3, **kw)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    np.testing.assert_allclose(chunk_loss(*args, chunk_size=3, **kw), plain_loss(*args, **kw), rtol=1e-6)


def test_scaled_cotangent_and_vmap():
    head, hidden, targets, weights = inputs()
    f = lambda h: 3 * chunk_loss(head, h, targets, weights, chunk_size=4) + jnp.sum(h)  # noqa: E731
    g = lambda h: 3 * plain_loss(head, h, targets, weights) + jnp.sum(h)  # noqa: E731
    np.testing.assert_allclose(jax.grad(f)(hidden), jax.grad(g)(hidden), atol=1e-5)
    many = jnp.stack([hidden, hidden * 2])
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(many), jax.vmap(jax.grad(g))(many), atol=2e-5)


def test_bfloat16_keeps_types_and_a_float32_softmax():
    head, hidden, targets, weights = inputs(jnp.bfloat16)
    got, (g_head, g_hidden) = jax.value_and_grad(chunk_loss, argnums=(0, 1))(head, hidden, targets, weights)
    assert got.dtype == jnp.float32
    assert g_hidden.dtype == jnp.bfloat16
    assert g_head["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(got, plain_loss(head, hidden, targets, weights), rtol=1e-5)


def test_accuracy_counts_hits_and_nll_is_plain():
    head, hidden, targets, weights = inputs()
    out = cross_entropy.over_positions(
        logits, head, hidden, targets, weights, vocab_size=VOCAB, chunk_size=4, measured=True, label_smoothing=0.2,
        z_loss=1e-2,
    )  # fmt: skip
    np.testing.assert_allclose(out.nll, plain_loss(head, hidden, targets, weights), rtol=1e-6)
    hits = np.argmax(np.asarray(logits(head, hidden)), -1) == np.asarray(targets)
    np.testing.assert_allclose(out.correct, np.sum(np.asarray(weights) * hits), rtol=1e-6)


def shapes_of(jaxpr):
    """Every shape that any equation makes, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for sub in jax.core.jaxprs_in_params(eqn.params):
            yield from shapes_of(sub)


def test_a_frozen_head_costs_no_gradient():
    head, hidden, targets, weights = inputs()
    frozen = jax.jit(jax.grad(lambda h: chunk_loss(head, h, targets, weights, chunk_size=5))).trace(hidden).jaxpr
    assert (EMBED, VOCAB) not in set(shapes_of(frozen.jaxpr))
    trained = jax.jit(jax.grad(lambda w: chunk_loss(w, hidden, targets, weights, chunk_size=5))).trace(head).jaxpr
    assert (EMBED, VOCAB) in set(shapes_of(trained.jaxpr))


def test_logits_of_the_whole_sequence_never_exist():
    head, hidden, targets, weights = inputs()
    f = jax.jit(jax.value_and_grad(lambda w, h: chunk_loss(w, h, targets, weights, chunk_size=2), argnums=(0, 1)))
    jaxpr = f.trace(head, hidden).jaxpr
    sizes = [np.prod(s) for s in shapes_of(jaxpr.jaxpr)]
    assert max(sizes) < BATCH * LENGTH * VOCAB
    assert max(sizes) >= BATCH * 2 * VOCAB


def test_memory_does_not_grow_with_vocabulary_times_length():
    def temp(length):
        big = {"kernel": jnp.zeros((EMBED, 4096)), "bias": jnp.zeros(4096)}
        h = jax.ShapeDtypeStruct((2, length, EMBED), jnp.float32)
        t = jax.ShapeDtypeStruct((2, length), jnp.int32)
        w = jax.ShapeDtypeStruct((2, length), jnp.float32)
        f = lambda h, t, w: cross_entropy.over_positions(logits, big, h, t, w, vocab_size=4096, chunk_size=16).loss  # noqa: E731
        return jax.jit(jax.grad(f)).lower(h, t, w).compile().memory_analysis().temp_size_in_bytes

    assert temp(512) - temp(128) < (512 - 128) * 2 * 4096 * 4 / 20


def test_default_chunk_keeps_to_the_budget():
    assert chunked.default_chunk(8, 32000) * 8 * 32000 * 4 <= chunked.CHUNK_BYTES["cpu"]
    assert chunked.default_chunk(65536, 256000) == 1
