"""A batch whose rows have adapters of their own gives what each adapter gives alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tunejax.core import errors
from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.core.model import full_batch
from tunejax.generate import decode, mixed
from tunejax.methods import registry

IDS = [2, 0, 1, 2, 1]
SPECS = {
    "lora": {"name": "lora", "rank": 3, "targets": "kernel"},
    "chain": [{"name": "ia3"}, {"name": "full", "targets": ["norm/scale", "/embed/table"]}],
    "prefix": {"name": "prefix_tuning", "length": 3},
    "prompt": {"name": "prompt_tuning", "length": 2},
}


def adapters(name, count=3):
    """(method, base, arrays of each), all moved off their start."""
    method = registry.build(SPECS[name])
    trains = []
    for i in range(count):
        start = method.init(jax.random.key(i), tiny.params())
        rng = np.random.default_rng(i)
        trains.append(jax.tree.map(lambda x, r=rng: x + 0.3 * r.standard_normal(x.shape, np.float32), start.train))
    base = methods.apply_edits(tiny.params(), start.edits)
    return method, base, trains, [start.state] * count


def prompts():
    """Prompts of several lengths, padded in front."""
    rng = np.random.default_rng(7)
    mask = (np.arange(6) >= np.array([0, 2, 3, 1, 4])[:, None]).astype(np.int32)
    return rng.integers(1, 31, mask.shape).astype(np.int32) * mask, mask


def logits_of(model, params, tokens, mask):
    hidden, _ = model.hidden(params, full_batch(jnp.asarray(tokens), jnp.asarray(mask)))
    return np.asarray(model.logits(model.head(params), hidden))


@pytest.mark.parametrize("name", SPECS)
def test_logits_and_greedy_text_of_a_mixed_batch_are_those_of_each_alone(name):
    method, base, trains, states = adapters(name)
    model, (tokens, mask) = tiny.model(), prompts()
    many = mixed.model_of(model, method)
    params = mixed.chosen(mixed.stacked(base, trains, states), IDS)
    prompt = range(31, 31 + method.prompt)
    found = jax.jit(lambda p: logits_of_traced(many, p, tokens, mask))(params)
    text = decode.generate(many, params, tokens, mask, max_new_tokens=5, prompt=prompt)
    said = []
    for i, train in enumerate(trains):
        own = method.bind(base, train, states[i], Context())
        rows = [r for r, which in enumerate(IDS) if which == i]
        alone = logits_of(model, own, tokens, mask)
        for r in rows:
            real = mask[r] > 0
            np.testing.assert_allclose(found[r][real], alone[r][real], atol=1e-5)
        text_alone = decode.generate(model, own, tokens, mask, max_new_tokens=5, prompt=prompt)
        np.testing.assert_array_equal(text[np.array(rows)], text_alone[np.array(rows)])
        said.append(np.asarray(text_alone))
    assert not np.array_equal(said[0], said[1])


def logits_of_traced(model, params, tokens, mask):
    hidden, _ = model.hidden(params, full_batch(jnp.asarray(tokens), jnp.asarray(mask)))
    return model.logits(model.head(params), hidden)


def test_taps_have_their_usual_axes():
    method, base, trains, states = adapters("lora")
    tokens, mask = prompts()
    params = mixed.chosen(mixed.stacked(base, trains, states), IDS)
    batch = full_batch(jnp.asarray(tokens), jnp.asarray(mask))
    _, aux = mixed.model_of(tiny.model(), method).hidden(params, batch, taps=("hidden",))
    assert aux["hidden"].shape == (3, 5, 6, 16)
    own = method.bind(base, trains[2], states[2], Context())
    _, alone = tiny.model().hidden(own, batch, taps=("hidden",))
    np.testing.assert_allclose(aux["hidden"][:, 0], alone["hidden"][:, 0], atol=1e-5)


@pytest.mark.parametrize("length", [6, 30])
def test_the_base_is_read_once_for_all_rows(length):
    """No kernel of the base gets a rows' axis in the program, also where rows are long enough to add LoRA's to it."""
    method, base, trains, states = adapters("lora")
    params = mixed.chosen(mixed.stacked(base, trains, states), IDS)
    tokens = mask = np.ones((len(IDS), length), np.int32)
    many = mixed.model_of(tiny.model(), method)
    text = str(jax.make_jaxpr(lambda p: logits_of_traced(many, p, tokens, mask))(params))
    assert "f32[16,24]" in text  # a kernel of the base, one layer
    assert "f32[5,16,24]" not in text  # the same a row
    assert "f32[5,16,31]" not in text  # the head a row
    assert "f32[5,31,16]" not in text  # the embedding a row


def test_mistakes_are_told():
    method, base, trains, states = adapters("lora")
    made = mixed.stacked(base, trains, states)
    with pytest.raises(errors.ConfigError, match="no adapter 3: they count from 0 to 2"):
        mixed.chosen(made, [0, 3])
    wider = registry.build({**SPECS["lora"], "rank": 4}).init(jax.random.key(0), tiny.params()).train
    with pytest.raises(errors.ConfigError, match="same names and shapes"):
        mixed.stacked(base, [trains[0], wider], states[:2])
    model = mixed.model_of(tiny.model(), method)
    with pytest.raises(errors.ConfigError, match="no dropout"):
        model.hidden(mixed.chosen(made, [0]), tiny.batch(1), key=jax.random.key(0))
