"""Laws of the built models: packing, caches, cuts, remat, slots, dropout, errors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import helpers
from tunejax.core import errors, paths, sites
from tunejax.core.operators import operator
from tunejax.models.build import build
from tunejax.models.config import ModelConfig
from tunejax.models.modules import dropout

CONFIG = ModelConfig(
    family="llama", vocab_size=50, embed_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24,
    max_positions=160,
)  # fmt: skip
ENCODER = ModelConfig(
    family="bert", kind="encoder", vocab_size=50, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4,
    mlp_dim=24, max_positions=160, activation="gelu", gated_mlp=False, norm="layer", position="learned",
    attention_bias=(True,) * 4, mlp_bias=True, tie_embeddings=True, type_vocab_size=2, num_labels=3, dropout=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    model = build(CONFIG, head="lm")
    return model, jax.jit(model.init)(jax.random.key(0))


def test_parameters_and_axes(llama):
    model, params = llama
    flat = paths.flatten(params)
    assert set(flat) == set(model.axes)
    assert all(x is None or len(x.shape) == len(model.axes[p]) for p, x in flat.items())
    assert flat["layers/0/attention/q/bias"] is None
    assert flat["layers/0/attention/prefix"] is None
    assert flat["layers/0/gate"] is None
    assert model.axes["layers/0/attention/q/kernel"] == ("layers", "embed", "heads")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_encoder_axes():
    for head in ("mlm", "classification", "none"):
        model = build(ENCODER, head=head)
        flat = paths.flatten(jax.eval_shape(model.init, jax.random.key(0)))
        assert all(x is None or len(x.shape) == len(model.axes[p]) for p, x in flat.items())


@pytest.mark.parametrize("kind", ["decoder", "encoder", "window"])
def test_packed_equals_unpacked(kind):
    window = dataclasses.replace(CONFIG, sliding_window=9)
    config = {"decoder": CONFIG, "encoder": ENCODER, "window": window}[kind]
    model = build(config, head="mlm" if kind == "encoder" else "lm")
    params = jax.jit(model.init)(jax.random.key(0))
    # Longer than two blocks of queries, so that the blocked path runs too.
    rng = np.random.default_rng(0)
    sizes = [140, 20, 101]
    examples = [rng.integers(0, 50, n) for n in sizes]
    pad = 280 - sum(sizes)
    packed = {
        "tokens": np.concatenate([*examples, np.zeros(pad, int)]),
        "segment_ids": np.concatenate([np.full(n, i + 1) for i, n in enumerate(sizes)] + [np.zeros(pad, int)]),
        "positions": np.concatenate([*map(np.arange, sizes), np.zeros(pad, int)]),
    }
    packed = {k: jnp.asarray(v, jnp.int32)[None] for k, v in packed.items()}
    run = jax.jit(lambda b: model.logits(params, model.hidden(params, b)[0]))
    together = np.asarray(run(packed))[0]
    start = 0
    for example in examples:
        alone = run({"tokens": jnp.asarray(example)[None]})[0]
        np.testing.assert_allclose(together[start : start + len(example)], alone, atol=1e-5, rtol=0)
        start += len(example)


def test_blocked_attention_equals_plain_in_float64_and_its_gradients():
    key = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(key[0], (2, 520, 4, 8))
    k, v = (jax.random.normal(x, (2, 520, 2, 8)) for x in key[1:3])
    prefix = tuple(jax.random.normal(x, (3, 2, 8)) for x in key[3:])
    where = sites.Where(jnp.tile(jnp.arange(520), (2, 1)), jnp.array([[1] * 520, [1] * 400 + [0] * 120]))
    real = (where.segment_ids > 0)[..., None, None]

    def ours(q, k, v, prefix):
        return jnp.where(real, sites.attention(q, k, v, where, where, causal=True, prefix=prefix), 0)

    def plain(q, k, v, prefix):
        front = [jnp.broadcast_to(p, (2, *p.shape)) for p in prefix]
        k, v = jnp.concatenate([front[0], k], 1), jnp.concatenate([front[1], v], 1)
        seen = sites.mask(where, where, causal=True)
        seen = jnp.concatenate([jnp.ones((2, 520, 3), bool), seen], 2)
        return jnp.where(real, jax.nn.dot_product_attention(q, k, v, mask=seen[:, None]), 0)

    def both(f, arrays):
        out, pull = jax.vjp(f, *arrays)
        return out, pull(jnp.cos(out))

    got = jax.jit(both, static_argnums=0)(ours, (q, k, v, prefix))
    with jax.enable_x64(True):  # gradients of keys and prefix are sums over all queries, up to 27
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), (q, k, v, prefix))
        want = jax.jit(both, static_argnums=0)(plain, exact)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max()), got, want)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_cached_decoding_equals_uncached(family, side):
    changes = {"llama": helpers.ROPE, "mistral": {**helpers.ROPE, "sliding_window": 4}, "gpt2": helpers.GPT2}[family]
    model, params, _ = helpers.ours(helpers.torch_model(family, "lm", **changes), "lm", cuts=(1,))
    tokens, mask = helpers.ragged(side)
    rng = np.random.default_rng(2)
    more = rng.integers(1, 97, (3, 3))
    whole = helpers.batch(np.concatenate([tokens, more], 1), np.concatenate([mask, np.ones((3, 3), int)], 1))
    expected = np.asarray(jax.jit(model.hidden)(params, whole)[0])
    step = jax.jit(lambda p, b, c: model.hidden(p, b, cache=c))
    cache, at = model.cache(3, 20, jnp.float32), 0
    for size in (13, 1, 1, 1):
        piece = {k: v[:, at : at + size] for k, v in whole.items()}
        hidden, aux = step(params, piece, cache)
        cache = aux["cache"]
        real = np.asarray(piece["segment_ids"]) > 0
        np.testing.assert_allclose(np.asarray(hidden)[real], expected[:, at : at + size][real], atol=1e-5)
        at += size
    assert int(cache["index"]) == 16


def restack(params, cuts, depth):
    edges = [0, *cuts, depth]
    layers = {str(i): jax.tree.map(lambda x, a=a, b=b: x[a:b], params["layers"]["0"])
              for i, (a, b) in enumerate(itertools.pairwise(edges))}  # fmt: skip
    return {**params, "layers": layers}


def test_cuts_change_nothing(llama):
    model, params = llama
    batch = {"tokens": jnp.arange(12).reshape(2, 6)}
    expected, aux = model.hidden(params, batch, taps=("hidden", "attention", "mlp"))
    cut = build(CONFIG, head="lm", cuts=(1, 3))
    again = restack(params, (1, 3), 4)
    assert set(paths.flatten(again)) == set(cut.axes)
    got, got_aux = cut.hidden(again, batch, taps=("hidden", "attention", "mlp"))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got_aux, aux)
    assert aux["hidden"].shape == (4, 2, 6, 16)
    jax.tree.map(np.testing.assert_array_equal, again, jax.jit(cut.init)(jax.random.key(0)))


def test_remat_changes_no_gradient(llama):
    _, params = llama
    batch = {"tokens": jnp.arange(12).reshape(2, 6)}

    def grads(remat):
        model = build(CONFIG, head="lm", remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.logits(p, model.hidden(p, batch)[0])))))(params)

    expected = grads("none")
    for remat in ("full", "dots", "projections"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads(remat), expected)


@operator
class Twice:
    """Twice a kernel."""

    kernel: jax.Array

    def __call__(self, x, bias=None):
        return 2 * (x @ self.kernel)

    def dense(self):
        return 2 * self.kernel

    @property
    def shape(self):
        return self.kernel.shape

    @property
    def dtype(self):
        return self.kernel.dtype


def test_slots_take_operators_biases_gates_and_prefixes(llama):
    model, params = llama
    model = model._replace(hidden=jax.jit(model.hidden))
    batch = {"tokens": jnp.arange(12).reshape(2, 6)}
    base = model.hidden(params, batch)[0]
    q = "layers/0/attention/q/kernel"
    kernel = paths.get(params, q)
    wrapped = model.hidden(paths.replace(params, {q: Twice(kernel)}), batch)[0]
    np.testing.assert_allclose(wrapped, model.hidden(paths.replace(params, {q: 2 * kernel}), batch)[0], atol=1e-6)
    for path, value in {
        "layers/0/mlp/up/bias": jnp.ones((4, 24)),
        "layers/0/gate": jnp.zeros(4),
        "layers/0/attention/prefix": (jnp.ones((4, 3, 2, 4)), jnp.ones((4, 3, 2, 4))),
    }.items():
        assert float(jnp.max(jnp.abs(model.hidden(paths.replace(params, {path: value}), batch)[0] - base))) > 1e-4
    closed = paths.replace(params, {"layers/0/gate": jnp.zeros(4)})
    x = params["embed"]["table"][batch["tokens"]]
    np.testing.assert_allclose(
        model.hidden(closed, batch)[0], x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6), atol=1e-5
    )


def test_dropout_needs_a_key_and_keeps_the_mean():
    model = build(ENCODER, head="none")
    params = jax.jit(model.init)(jax.random.key(0))
    batch = {"tokens": jnp.arange(12).reshape(2, 6)}
    plain, a, b = (jax.jit(model.hidden)(params, batch, key=k)[0] for k in (None, jax.random.key(1), jax.random.key(2)))
    assert not np.allclose(plain, a)
    assert not np.allclose(a, b)
    x = dropout(jnp.ones((1000, 100)), 0.3, jax.random.key(0))
    np.testing.assert_allclose(float(x.mean()), 1.0, atol=0.01)


def test_bfloat16_stays_close(llama):
    _, params = llama
    batch = {"tokens": jnp.arange(12).reshape(2, 6)}
    half = build(CONFIG, head="lm", dtype=jnp.bfloat16)
    hidden = half.hidden(params, batch)[0]
    assert hidden.dtype == jnp.bfloat16
    exact = build(CONFIG, head="lm").hidden(params, batch)[0]
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.1)


def test_unknown_choices_are_refused(llama):
    model, params = llama
    batch = {"tokens": jnp.zeros((1, 2), jnp.int32)}
    with pytest.raises(errors.ConfigError, match="mlm"):
        build(CONFIG, head="mlm")
    with pytest.raises(errors.ConfigError, match="num_labels"):
        build(CONFIG, head="classification")
    with pytest.raises(errors.ConfigError, match="cuts"):
        build(CONFIG, head="lm", cuts=(9,))
    with pytest.raises(errors.ConfigError, match="'full'"):
        build(CONFIG, head="lm", remat="ful").hidden(params, batch)
    with pytest.raises(errors.ConfigError, match="'hidden'"):
        model.hidden(params, batch, taps=("hiden",))
    with pytest.raises(errors.ConfigError, match="no logits"):
        build(CONFIG, head="none").logits({}, jnp.zeros((1, 16)))
