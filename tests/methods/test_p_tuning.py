"""P-tuning against HF PEFT's prompt encoder, and the rows that it flattens to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import tiny

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.methods import p_tuning, prompt_tuning, registry

N, HIDDEN, KEY = 5, 6, jax.random.key(0)
TABLE = "embed/table"


def ours(weights):
    """PEFT's encoder -> the train of our method."""
    out = {"rows": weights["embedding.weight"]}
    heads = sorted({int(k.split(".")[1]) for k in weights if k.startswith("mlp_head")})
    for i, n in enumerate(heads):
        out |= {f"w{i}": weights[f"mlp_head.{n}.weight"].T, f"bias{i}": weights[f"mlp_head.{n}.bias"]}
    i = 0
    while f"lstm_head.weight_ih_l{i}" in weights:
        both = [f"l{i}", f"l{i}_reverse"]
        x, h, b, c = ([weights[f"lstm_head.{kind}_{end}"] for end in both]
                      for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # fmt: skip
        out[f"lstm{i}_x"], out[f"lstm{i}_h"] = np.stack([w.T for w in x]), np.stack([w.T for w in h])
        out[f"lstm{i}_bias"] = np.stack(b) + np.stack(c)
        i += 1
    return {TABLE: jax.tree.map(jnp.asarray, out)}


def arrays_of(made, of):
    return {k.removeprefix("prompt_encoder.default."): of(w).numpy() for k, w in ref.trained(made).items()}


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_logits_and_gradients_on_llama(kind, tmp_path):
    theirs, model, params = ref.load("llama", tmp_path)
    words = {"num_virtual_tokens": N, "encoder_reparameterization_type": kind, "encoder_hidden_size": HIDDEN}
    made = ref.tuned(theirs, ref.peft.PromptEncoderConfig(**words), "llama")
    tokens, mask = ref.rows()
    real = np.concatenate([np.ones((2, N)), mask], 1)[..., None].astype(np.float32)
    expected = made(ref.torch.tensor(tokens).long(), attention_mask=ref.torch.tensor(mask)).logits
    (expected * ref.torch.tensor(real)).square().sum().backward()
    method, batch = registry.build({"name": "p_tuning", **words}), ref.with_prompt(tokens, mask, N)
    assert method.prompt == N
    train = ours(arrays_of(made, lambda w: w.detach()))
    assert jax.tree.map(jnp.shape, train) == jax.tree.map(jnp.shape, method.init(KEY, params).train)

    @jax.jit
    def run(train):
        found = ref.logits(model, method.bind(params, train, {}, Context()), batch) * real
        return jnp.sum(found**2), found

    (_, found), grads = jax.value_and_grad(run, has_aux=True)(train)
    np.testing.assert_allclose(found, expected.detach().numpy() * real, atol=1e-5, rtol=1e-5)
    slopes = ours(arrays_of(made, lambda w: w.grad))
    for name, g in grads[TABLE].items():
        # torch's two biases have one gradient, which `ours` adds up.
        e = slopes[TABLE][name] / (2 if name.endswith("_bias") else 1)
        assert np.abs(e).max() > 1e-4, name
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-4 * np.abs(e).max(), err_msg=name)


@pytest.mark.parametrize("kind", p_tuning.ENCODERS)
def test_flattened_it_is_prompt_tuning(kind):
    p = tiny.params()
    method = p_tuning.p_tuning(N, kind, hidden=HIDDEN)
    train = jax.eval_shape(method.init, KEY, p).train
    rng = np.random.default_rng(0)
    train = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), train)
    a = method.bind(p, train, {}, Context())["embed"]["table"]
    b = prompt_tuning.prompt_tuning(N).bind(p, p_tuning.flatten(train), {}, Context())["embed"]["table"]
    np.testing.assert_allclose(a.rows, b.rows, atol=1e-6)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    with pytest.raises(errors.NotLinear, match=f"{TABLE}: 5 virtual tokens"):
        method.merge(p, train, {})


def test_dropout_is_on_while_training_alone():
    p = tiny.params()
    method = p_tuning.p_tuning(N, "lstm", hidden=HIDDEN, dropout=0.5)
    train = method.init(KEY, p).train
    off, on, other = (
        method.bind(p, train, {}, Context(key=jax.random.key(i), train=t))["embed"]["table"].rows
        for i, t in ((0, False), (0, True), (1, True))
    )
    np.testing.assert_allclose(off, p_tuning.encode(train[TABLE]), atol=1e-6)
    assert np.abs(off - on).max() > 1e-4
    assert np.abs(other - on).max() > 1e-4


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"length": 0}, "length is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"encoder": "gru"}, "encoder is 'gru'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_arguments(bad, says):
    with pytest.raises(errors.ConfigError, match=says):
        p_tuning.p_tuning(**bad)
