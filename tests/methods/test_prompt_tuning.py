"""Prompt tuning against HF PEFT, and what it must keep: packing, cached decoding, the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import tiny

from tunejax.core import errors
from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.generate import decode
from tunejax.methods import lora, prompt_tuning, registry

N = 5
KEY = jax.random.key(0)
SPEC = {"name": "prompt_tuning", "num_virtual_tokens": N}


def bound(method, params, rows):
    return method.bind(params, {"embed/table": {"rows": rows}}, {}, Context())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    theirs, model, params = ref.load("llama", tmp_path_factory.mktemp("llama"))
    made = ref.tuned(theirs, ref.peft.PromptTuningConfig(num_virtual_tokens=N), "llama")
    (weight,) = ref.trained(made).values()
    return made, model, params, weight


def compare(found, expected, ours, theirs):
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    theirs = theirs.grad.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_logits_and_gradients_on_llama(llama):
    made, model, params, weight = llama
    tokens, mask = ref.rows()
    weight.grad = None
    expected = made(ref.torch.tensor(tokens).long(), attention_mask=ref.torch.tensor(mask)).logits
    assert expected.shape[1] == N + tokens.shape[1]
    real = np.concatenate([np.ones((2, N)), mask], 1)[..., None].astype(np.float32)
    (expected * ref.torch.tensor(real)).square().sum().backward()
    method, batch = registry.build(SPEC), ref.with_prompt(tokens, mask, N)

    @jax.jit
    def run(rows):
        found = ref.logits(model, bound(method, params, rows), batch) * real
        return jnp.sum(found**2), found

    (_, found), grads = jax.value_and_grad(run, has_aux=True)(jnp.asarray(weight.detach().numpy()))
    compare(found, expected.detach().numpy() * real, grads, weight)


@pytest.mark.parametrize("kind", ["bert", "bert_classes"])
def test_logits_and_gradients_on_bert(kind, tmp_path):
    theirs, model, params = ref.load(kind, tmp_path)
    made = ref.tuned(theirs, ref.peft.PromptTuningConfig(num_virtual_tokens=N), kind)
    (weight,) = ref.trained(made).values()
    tokens, mask = ref.rows()
    real = np.concatenate([np.ones((2, N)), mask], 1)[..., None].astype(np.float32)
    expected = made(ref.torch.tensor(tokens).long(), attention_mask=ref.torch.tensor(mask)).logits
    # A sequence is classified by what stands first: the first virtual token.
    expected = expected if kind == "bert_classes" else expected * ref.torch.tensor(real)
    expected.square().sum().backward()
    method, batch = registry.build(SPEC), ref.with_prompt(tokens, mask, N)

    @jax.jit
    def run(rows):
        found = ref.logits(model, bound(method, params, rows), batch)
        found = found[:, 0] if kind == "bert_classes" else found * real
        return jnp.sum(found**2), found

    (_, found), grads = jax.value_and_grad(run, has_aux=True)(jnp.asarray(weight.detach().numpy()))
    compare(found, expected.detach().numpy(), grads, weight)


def test_packed_equals_unpacked(llama):
    _, model, params, weight = llama
    tokens, mask = ref.rows()
    p = bound(registry.build(SPEC), params, jnp.asarray(weight.detach().numpy()))
    apart = ref.logits(model, p, ref.with_prompt(tokens, mask, N))
    together = ref.logits(model, p, ref.packed(tokens, mask, N))[0]
    lengths = mask.sum(1) + N
    expected = np.concatenate([apart[i, :n] for i, n in enumerate(lengths)])
    np.testing.assert_allclose(together, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_cached_decoding_is_the_uncached_and_pefts(llama):
    made, model, params, weight = llama
    method = registry.build(SPEC)
    p = bound(method, params, jnp.asarray(weight.detach().numpy()))
    tokens, mask = ref.rows()
    tokens, mask = np.flip(tokens, 1).copy(), np.flip(mask, 1).copy()  # padding in front
    virtual = tuple(range(ref.VOCAB, ref.VOCAB + method.prompt))
    new = np.asarray(decode.generate(model, p, tokens, mask, max_new_tokens=6, prompt=virtual))
    for i in range(2):
        ids = tokens[i : i + 1, mask[i] > 0]
        np.testing.assert_array_equal(new[i], ref.greedy(made, ids, 6))
        # One pass over the whole text says what each step said.
        whole = np.concatenate([ids, new[i : i + 1]], 1)
        steps = ref.logits(model, p, ref.with_prompt(whole, np.ones_like(whole), N))[0, N + ids.shape[1] - 1 : -1]
        np.testing.assert_array_equal(jnp.argmax(steps, -1), new[i])


def test_starts():
    p = tiny.params()
    table = np.asarray(p["embed"]["table"])
    rows = prompt_tuning.prompt_tuning(400).init(KEY, p).train["embed/table"]["rows"]
    assert rows.shape == (400, 16)
    assert np.abs(rows).max() <= 0.5
    np.testing.assert_allclose(np.std(rows), 1 / np.sqrt(12), rtol=0.05)
    drawn = prompt_tuning.prompt_tuning(6, init="SAMPLE_VOCAB").init(KEY, p).train["embed/table"]["rows"]
    assert all((table == row).all(1).any() for row in np.asarray(drawn))
    spec = {**SPEC, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "ab"}
    text = registry.build(spec, lambda t: [ord(c) - 90 for c in t]).init(KEY, p).train["embed/table"]["rows"]
    np.testing.assert_array_equal(text, table[[7, 8, 7, 8, 7]])
    cut = prompt_tuning.prompt_tuning(2, init_text=[3, 1, 4]).init(KEY, p).train["embed/table"]["rows"]
    np.testing.assert_array_equal(cut, table[[3, 1]])
    shapes = jax.eval_shape(prompt_tuning.prompt_tuning(4, init="vocab").init, KEY, p)
    assert shapes.train["embed/table"]["rows"].shape == (4, 16)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"length": 0}, "length is 0"),
        ({"init": "vocabulary"}, "init is 'vocabulary'. Did you mean 'vocab'"),
        ({"init": "text"}, "init_text is missing"),
        ({"init": "random", "init_text": [1]}, "init_text is there"),
        ({"init_text": "words"}, "without a tokenizer"),
    ],
)
def test_bad_arguments(bad, says):
    with pytest.raises(errors.ConfigError, match=says):
        prompt_tuning.prompt_tuning(**bad)


def test_an_id_outside_the_vocabulary():
    with pytest.raises(errors.ConfigError, match="id 31; the vocabulary has 31"):
        prompt_tuning.prompt_tuning(2, init_text=[31]).init(KEY, tiny.params())


def test_it_cannot_be_merged_and_says_where():
    p = tiny.params()
    method = methods.chain(prompt_tuning.prompt_tuning(3), lora.lora(rank=2))
    start = method.init(KEY, p)
    with pytest.raises(errors.NotLinear, match="embed/table: 3 virtual tokens"):
        method.merge(p, start.train, start.state)


def test_a_chain_counts_all_and_the_first_comes_first():
    p = tiny.params()
    two = methods.chain(prompt_tuning.prompt_tuning(2), lora.lora(rank=2), prompt_tuning.prompt_tuning(3))
    assert (two.prompt, lora.lora().prompt) == (5, 0)
    start = two.init(KEY, p)
    table = two.bind(p, start.train, start.state, Context())["embed"]["table"]
    first, last = (start.train[k]["embed/table"]["rows"] for k in ("0:prompt_tuning", "2:prompt_tuning"))
    np.testing.assert_array_equal(table.lookup(jnp.arange(31, 36)), np.concatenate([first, last]))


def test_vmap_over_train():
    m, p = tiny.model(), tiny.params()
    method = prompt_tuning.prompt_tuning(2)
    trains = jax.vmap(lambda k: method.init(k, p).train)(jax.random.split(KEY, 3))
    batch = {"tokens": jnp.array([[31, 32, 4, 5]])}
    outs = jax.jit(jax.vmap(lambda t: ref.logits(m, method.bind(p, t, {}, Context()), batch)))(trains)
    one = ref.logits(m, method.bind(p, jax.tree.map(lambda x: x[1], trains), {}, Context()), batch)
    np.testing.assert_allclose(outs[1], one, atol=1e-5)
    assert outs.shape == (3, 1, 4, 31)
