"""Prefix tuning against HF PEFT, with and without its MLP, and what it must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import tiny

from tunejax.core import errors, paths
from tunejax.core import method as methods
from tunejax.core import model as models
from tunejax.core.method import Context
from tunejax.generate import decode
from tunejax.methods import lora, prefix, registry
from tunejax.models import build

N, HIDDEN, KEY = 5, 6, jax.random.key(0)
SLOT = "layers/0/attention/prefix"
SPEC = {"name": "prefix_tuning", "num_virtual_tokens": N}


def pairs(weight):
    """PEFT's [length, layers * 2 * kv] -> the train of our method."""
    x = np.moveaxis(weight.reshape(len(weight), 2, 2, -1), 0, 2)
    return {SLOT: {"key": jnp.asarray(x[:, 0]), "value": jnp.asarray(x[:, 1])}}


def projected(weights):
    """PEFT's encoder -> the train of our method with its MLP."""
    rows, w, b, w2, b2 = (weights[k] for k in ("embedding.weight", "transform.0.weight", "transform.0.bias",
                                               "transform.2.weight", "transform.2.bias"))  # fmt: skip
    w2, b2 = w2.T.reshape(len(w2.T), 2, 2, -1), b2.reshape(2, 2, -1)
    train = {"shared": {"rows": rows, "w": w.T, "b": b}, SLOT: {}}
    for i, name in enumerate(prefix.PAIR):
        train[SLOT] |= {f"{name}_w": np.moveaxis(w2[:, :, i], 0, 1), f"{name}_b": b2[:, i]}
    return jax.tree.map(jnp.asarray, train)


def arrays_of(made, of=lambda w: w.detach()):
    return {k.removeprefix("prompt_encoder.default."): of(w).numpy() for k, w in ref.trained(made).items()}


def check(theirs_run, made, model, params, project, select):
    """Logits to 1e-5 and the gradients of all that trains to 1e-4. theirs_run: (tokens, mask) -> logits."""
    tokens, mask = ref.rows()
    expected = select(theirs_run(ref.torch.tensor(tokens).long(), ref.torch.tensor(mask)), mask)
    expected.square().sum().backward()
    spec = {**SPEC, "prefix_projection": True, "encoder_hidden_size": HIDDEN} if project else SPEC
    method, ours = registry.build(spec), projected if project else lambda w: pairs(w["embedding.weight"])
    train = ours(arrays_of(made))
    assert jax.tree.map(jnp.shape, train) == jax.tree.map(jnp.shape, method.init(KEY, params).train)
    batch = models.full_batch(jnp.asarray(tokens), jnp.asarray(mask))

    @jax.jit
    def run(train):
        found = select(ref.logits(model, method.bind(params, train, {}, Context()), batch), mask)
        return jnp.sum(found**2), found

    (_, found), grads = jax.value_and_grad(run, has_aux=True)(train)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5, rtol=1e-5)
    for (path, g), e in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(ours(arrays_of(made, lambda w: w.grad))), strict=True
    ):
        assert np.abs(e).max() > 1e-3, path
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-4 * np.abs(e).max(), err_msg=str(path))


def real(x, mask):
    """Logits where tokens are real, 0 elsewhere."""
    weight = mask[..., None].astype(np.float32)
    return x * (ref.torch.tensor(weight) if isinstance(x, ref.torch.Tensor) else weight)


def config(project):
    made = {"prefix_projection": True, "encoder_hidden_size": HIDDEN} if project else {}
    return ref.peft.PrefixTuningConfig(num_virtual_tokens=N, **made)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return ref.load("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("project", [False, True])
def test_logits_and_gradients_on_llama(llama, project):
    theirs, model, params = llama
    made = ref.tuned(theirs, config(project), "llama")
    check(lambda t, m: made(t, attention_mask=m).logits, made, model, params, project, real)


def test_logits_and_gradients_on_bert(tmp_path):
    theirs, model, params = ref.load("bert_classes", tmp_path)
    made = ref.tuned(theirs, config(False), "bert_classes")

    def first(x, mask):
        return x if isinstance(x, ref.torch.Tensor) else x[:, 0]

    def run(tokens, mask):
        # PEFT's own forward looks for an argument that BERT has renamed, so its keys and values go in by hand, with
        # the mask over both: BERT makes one over the text alone.
        mask = ref.torch.cat([ref.torch.ones(2, N), mask], 1)[:, None, None]
        mask = ((1 - mask) * -1e9).expand(-1, -1, tokens.shape[1], -1)
        base = made.get_base_model()
        return base.classifier(base.bert(tokens, attention_mask=mask, cache=made.get_prompt(2)).pooler_output)

    check(run, made, model, params, False, first)


def test_packing_and_cached_decoding(llama):
    theirs, model, params = llama
    made = ref.tuned(theirs, config(False), "llama")
    p = registry.build(SPEC).bind(params, pairs(arrays_of(made)["embedding.weight"]), {}, Context())
    tokens, mask = ref.rows()
    apart = ref.logits(model, p, ref.with_prompt(tokens, mask, 0))
    together = ref.logits(model, p, ref.packed(tokens, mask, 0))[0]
    np.testing.assert_allclose(together, np.concatenate([apart[i, :n] for i, n in enumerate(mask.sum(1))]), atol=1e-5)
    new = np.asarray(decode.generate(model, p, tokens, mask, max_new_tokens=6))
    # PEFT's generate leaves its own forward here (it looks for the cache under an older name), so that is asked.
    whole = ref.torch.tensor(np.concatenate([tokens[:1], new[:1]], 1)).long()
    np.testing.assert_array_equal(new[0], made(whole).logits[0, -7:-1].argmax(-1).numpy())
    for i in range(2):
        whole = np.concatenate([tokens[i, mask[i] > 0], new[i]])[None]
        steps = ref.logits(model, p, ref.with_prompt(whole, np.ones_like(whole), 0))[0, -7:-1]
        np.testing.assert_array_equal(jnp.argmax(steps, -1), new[i])


def test_starts_and_what_flatten_keeps():
    p = tiny.params(cuts=(1,))
    small = prefix.prefix_tuning(3, layers="1:")
    start = small.init(KEY, p)
    assert jax.tree.map(jnp.shape, start.train) == {"layers/1/attention/prefix": {"key": (2, 3, 8), "value": (2, 3, 8)}}
    assert (small.cuts(3), small.prefix) == ((1,), 3)
    assert prefix.p_tuning_v2(4).name == "p_tuning_v2"
    for project in (False, True):
        zero = prefix.prefix_tuning(2, project=project, init="zero").init(KEY, p).train
        assert not any(np.any(x) for pair in prefix.flatten(zero).values() for x in pair.values())
    method = prefix.prefix_tuning(4, project=True, hidden=7)
    train = method.init(KEY, p).train
    flat = prefix.flatten(train)
    assert jax.tree.map(jnp.shape, flat) == jax.tree.map(jnp.shape, prefix.prefix_tuning(4).init(KEY, p).train)
    a, b = method.bind(p, train, {}, Context()), prefix.prefix_tuning(4).bind(p, flat, {}, Context())
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("config", "head"), [(tiny.GPT2, "lm"), (tiny.BERT, "mlm")])
def test_without_positions_the_text_counts_from_0(config, head):
    """A roll of the position table by the prefix's length makes the two the same."""
    m, p = tiny.model(config, head), tiny.params(config, head)
    free, taking = (prefix.prefix_tuning(3, positions=x) for x in (False, True))
    assert (free.prefix, taking.prefix) == (0, 3)
    assert methods.chain(free, prefix.prefix_tuning(2, layers="1:")).prefix == 2
    train = free.init(KEY, p).train
    moved = paths.replace(p, {"positions/table": jnp.roll(p["positions"]["table"], 3, axis=0)})
    real = tiny.batch()["segment_ids"] > 0
    one = tiny.outputs(m, free.bind(p, train, {}, Context()))[real]
    np.testing.assert_allclose(one, tiny.outputs(m, taking.bind(moved, train, {}, Context()))[real], atol=1e-5)
    assert np.abs(one - tiny.outputs(m, taking.bind(p, train, {}, Context()))[real]).max() > 1e-3


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.GPT2])
def test_without_positions_cached_decoding_and_packed_rows_agree(config):
    m, p = tiny.model(config), tiny.params(config)
    method = prefix.prefix_tuning(3, positions=False)
    p = method.bind(p, method.init(KEY, p).train, {}, Context())
    tokens, mask = ref.rows()
    new = np.asarray(decode.generate(m, p, tokens, mask, max_new_tokens=6))
    for i in range(2):
        whole = np.concatenate([tokens[i, mask[i] > 0], new[i]])[None]
        steps = ref.logits(m, p, models.full_batch(jnp.asarray(whole)))[0, -7:-1]
        np.testing.assert_array_equal(jnp.argmax(steps, -1), new[i])
    apart = ref.logits(m, p, ref.with_prompt(tokens, mask, 0))
    together = ref.logits(m, p, ref.packed(tokens, mask, 0))[0]
    np.testing.assert_allclose(together, np.concatenate([apart[i, :n] for i, n in enumerate(mask.sum(1))]), atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "projections"])
def test_without_positions_gradients_do_not_depend_on_remat(remat):
    method, batch = prefix.prefix_tuning(3, positions=False), tiny.batch()
    p = tiny.params(tiny.GPT2)
    train = method.init(KEY, p).train

    def grads(model):
        return jax.jit(jax.grad(lambda t: jnp.sum(ref.logits(model, method.bind(p, t, {}, Context()), batch) ** 2)))(
            train
        )

    one, two = (grads(build.build(tiny.GPT2, head="lm", remat=r)) for r in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, two)


def test_axes_follow_the_keys():
    m, p = tiny.model(), tiny.params()
    for project in (False, True):
        method = prefix.prefix_tuning(3, project=project)
        shapes = jax.eval_shape(method.init, KEY, p).train
        axes = method.axes(m.axes, shapes)
        assert jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.map(
            lambda x: len(x.shape), shapes
        )
        assert set(axes[SLOT].values()) <= {("layers", None, "kv"), ("layers", "kv")}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"length": 0}, "length is 0"),
        ({"hidden": 4}, "hidden is 4, the inner width of project: true"),
        ({"init": "zeros"}, "init is 'zeros'. Did you mean 'zero'"),
    ],
)
def test_bad_arguments(bad, says):
    with pytest.raises(errors.ConfigError, match=says):
        prefix.prefix_tuning(**bad)


def test_it_cannot_be_merged_nor_filled_twice():
    p = tiny.params()
    both = methods.chain(prefix.prefix_tuning(3), lora.lora("attention/q/kernel", rank=2))
    start = both.init(KEY, p)
    assert both.prefix == 3
    with pytest.raises(errors.NotLinear, match=f"{SLOT}: 3 trained keys"):
        both.merge(p, start.train, start.state)
    with pytest.raises(errors.TargetError, match="no slot 'attention/prefix' is empty"):
        methods.chain(prefix.prefix_tuning(3), prefix.p_tuning_v2(2)).init(KEY, p)


def test_vmap_over_train():
    m, p = tiny.model(), tiny.params()
    method = prefix.prefix_tuning(2, project=True)
    trains = jax.vmap(lambda k: method.init(k, p).train)(jax.random.split(KEY, 3))
    outs = jax.jit(jax.vmap(lambda t: ref.logits(m, method.bind(p, t, {}, Context()), tiny.batch())))(trains)
    one = tiny.outputs(m, method.bind(p, jax.tree.map(lambda x: x[1], trains), {}, Context()))
    np.testing.assert_allclose(outs[1], one, atol=1e-5)
