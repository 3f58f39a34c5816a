"""Decoding against transformers' generate and against the model without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.core import errors
from tunejax.core.method import Context, apply_edits
from tunejax.core.model import full_batch
from tunejax.generate import decode
from tunejax.generate.sampling import Sampling
from tunejax.models import build
from tunejax.models.config import ModelConfig

TINY = ModelConfig(
    family="llama",
    vocab_size=64,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_positions=128,
    tie_embeddings=True,
    extra=(("initializer_range", 0.4),),
)
PROMPTS = [[5, 9, 33], [7], [12, 44, 2, 8, 61, 30, 17], [1, 2]]


def padded(prompts, side):
    """Tokens and mask with padding (of an id that is no padding's) on one side."""
    width = max(map(len, prompts))
    tokens, mask = np.full((len(prompts), width), 3), np.zeros((len(prompts), width), int)
    for row, p in enumerate(prompts):
        here = slice(0, len(p)) if side == "right" else slice(width - len(p), width)
        tokens[row, here], mask[row, here] = p, 1
    return tokens, mask


@pytest.fixture(scope="module")
def tiny():
    model = build.build(TINY, head="lm")
    return model, model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def greedy(tiny):
    """Ten tokens a prompt, the whole text through the model for every one of them."""
    model, params = tiny
    tokens, mask = (np.pad(x, ((0, 0), (0, 10))) for x in padded(PROMPTS, "right"))
    rows = np.arange(len(PROMPTS))

    @jax.jit
    def following(tokens, mask):
        hidden, _ = model.hidden(params, full_batch(tokens, mask))
        return jnp.argmax(model.logits(params, hidden[rows, mask.sum(axis=1) - 1]), axis=-1)

    found = []
    for _ in range(10):
        found.append(np.asarray(following(tokens, mask)))
        at = mask.sum(axis=1)
        tokens[rows, at], mask[rows, at] = found[-1], 1
    return np.stack(found, axis=1).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_equals_uncached_on_ragged_prompts(tiny, greedy, side):
    out = decode.generate(*tiny, *padded(PROMPTS, side), max_new_tokens=10)
    assert np.asarray(out).tolist() == greedy


def test_rows_end_with_their_stop_token(tiny, greedy):
    stops = [greedy[0][3], greedy[2][5]]
    out = np.asarray(decode.generate(*tiny, *padded(PROMPTS, "left"), max_new_tokens=10, stop_tokens=stops, pad_id=63))
    for row, full in zip(out.tolist(), greedy, strict=True):
        end = next((i + 1 for i, t in enumerate(full) if t in stops), 10)
        assert row == full[:end] + [63] * (10 - end)


def test_streaming_yields_the_same_tokens_and_ends_early(tiny, greedy):
    some = {"max_new_tokens": 10, "stop_tokens": [row[2] for row in greedy], "pad_id": 63}
    whole = np.asarray(decode.generate(*tiny, *padded(PROMPTS, "right"), **some))
    steps = np.stack(list(decode.stream(*tiny, *padded(PROMPTS, "right"), **some)), axis=1)
    assert steps.shape[1] <= 3
    np.testing.assert_array_equal(steps, whole[:, : steps.shape[1]])
    assert (whole[:, steps.shape[1] :] == 63).all()


def test_sampling_is_repeatable_and_does_not_depend_on_the_padding(tiny):
    how = {"max_new_tokens": 8, "sampling": Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01)}
    draws = [
        np.asarray(decode.generate(*tiny, *padded(PROMPTS, side), key=jax.random.key(seed), **how))
        for side, seed in (("left", 0), ("right", 0), ("left", 1))
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    alone = decode.generate(*tiny, [PROMPTS[0]], key=jax.random.key(0), **how)
    np.testing.assert_array_equal(np.asarray(alone)[0], draws[0][0])


def test_bound_operators_decode_as_their_merged_kernels(tiny):
    from tunejax.methods import lora

    model, params = tiny
    method = lora.lora(rank=2, targets=["attention/{q,v}/kernel", "mlp/*/kernel"])
    start = method.init(jax.random.key(1), params)
    train = jax.tree.map(lambda x: x + 0.2, start.train)
    base = apply_edits(params, start.edits)
    prompts, more = padded(PROMPTS, "left"), {"max_new_tokens": 6}
    bound = decode.generate(model, method.bind(base, train, start.state, Context()), *prompts, **more)
    merged = decode.generate(model, method.merge(base, train, start.state), *prompts, **more)
    plain = decode.generate(model, params, *prompts, **more)
    np.testing.assert_array_equal(bound, merged)
    assert (np.asarray(bound) != np.asarray(plain)).any()


def test_segments_and_half_precision_keep_the_cache_in_the_computations_type(tiny):
    model = build.build(TINY, head="lm", cuts=(1,), dtype=jnp.bfloat16)
    out = decode.generate(model, model.init(jax.random.key(0)), *padded(PROMPTS, "left"), max_new_tokens=3)
    assert out.shape == (4, 3)
    assert out.dtype == jnp.int32


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tokens": [5, 6]}, "expected both"),
        ({"attention_mask": [[0, 0]]}, "prompt 0 is empty"),
        ({"attention_mask": [[1]]}, "mask of shape"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"sampling": Sampling(temperature=1.0)}, "needs a key"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, change, word):
    given = {"tokens": [[5, 6]], "attention_mask": [[1, 1]], "max_new_tokens": 4} | change
    with pytest.raises(errors.ConfigError, match=word):
        decode.generate(*tiny, given.pop("tokens"), given.pop("attention_mask"), **given)


# ---- the real model ---------------------------------------------------------------------------------------

REFERENCE = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
    "a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.fixture(scope="module")
def stories(assets):
    from transformers import AutoTokenizer

    from tunejax.interop import hf

    folder = assets / "models" / "stories260k"
    config = hf.read_config(folder)
    params, _ = hf.load(folder, config, head="lm", key=jax.random.key(0))
    return build.build(config, head="lm"), params, AutoTokenizer.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def theirs(stories):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(stories[3]).eval()


TEXTS = ["Once upon a time", "The dog", "Lily and Tom went to the park. They saw a big", "One day"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_text_equals_transformers(stories, theirs, side):
    import torch

    model, params, tokenizer, _ = stories
    prompts = [tokenizer(t).input_ids for t in TEXTS]
    ours = np.asarray(decode.generate(model, params, *padded(prompts, side), max_new_tokens=200, stop_tokens=(1, 2)))
    for row, prompt in zip(ours.tolist(), prompts, strict=True):
        with torch.no_grad():
            full = theirs.generate(torch.tensor([prompt]), max_new_tokens=200, do_sample=False)[0]
        expected = full[len(prompt) :].tolist()
        assert row == expected + [0] * (200 - len(expected))


def test_reference_text_of_stories260k(stories, theirs):
    import torch

    model, params, tokenizer, _ = stories
    out = np.asarray(decode.generate(model, params, [[1]], max_new_tokens=200))[0]
    with torch.no_grad():
        full = theirs.generate(torch.tensor([[1]]), min_new_tokens=200, max_new_tokens=200, do_sample=False)[0]
    assert out.tolist() == full[1:].tolist()
    assert tokenizer.decode(out).startswith(REFERENCE)


def test_reference_loss_of_stories260k(stories, assets):
    """1.288 nats a token over the text of the first 80 stories, each after its begin token and cut to the context."""
    from tunejax.objectives import causal_lm

    model, params, tokenizer, _ = stories
    text = (assets / "data/tinystories_sample/valid.txt").read_text(encoding="utf-8")
    stories_ = [s.strip() for s in text.split("<|endoftext|>") if s.strip()][:80]
    rows = [tokenizer(s, truncation=True, max_length=512).input_ids for s in stories_]
    tokens, mask = padded([row[:-1] for row in rows], "right")
    targets, _ = padded([row[1:] for row in rows], "right")
    batch = {**full_batch(jnp.asarray(tokens), jnp.asarray(mask)), "targets": jnp.asarray(targets)}
    batch["loss_weights"] = jnp.asarray(mask, jnp.float32)
    loss, weight, _ = causal_lm.make().loss(model, params, {}, batch, Context())
    assert len(rows) == 80
    assert float(loss / weight) == pytest.approx(1.288, abs=5e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_before_every_row_is_a_longer_row(tiny, side):
    model, params = tiny
    tokens, mask = padded(PROMPTS, side)
    longer = padded([[60, 2, *p] for p in PROMPTS], side)
    expected = decode.generate(model, params, *longer, max_new_tokens=5)
    np.testing.assert_array_equal(
        decode.generate(model, params, tokens, mask, max_new_tokens=5, prompt=(60, 2)), expected
    )
