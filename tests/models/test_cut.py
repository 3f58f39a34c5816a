"""A cut model is the masked one, for every dimension and family, and PyTorch transformers loads it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.models import helpers
from tunejax.core import errors, low_rank, masked, operators, paths
from tunejax.interop import hf
from tunejax.models import build, cut

CASES = {
    "llama": ("lm", {**helpers.ROPE}),
    "qwen3": ("lm", {**helpers.ROPE, "head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("lm", helpers.GPT2),
    "bert": ("mlm", helpers.SMALL),
}
KEPT = {"heads": 1, "mlp": 29, "depth": 2, "hidden": 24}
DIMENSIONS = {**{name: (name,) for name in KEPT}, "all": tuple(KEPT)}
OWN_HEAD_DIM = ("llama", "qwen3")
TOKENS, MASK = helpers.ragged()


@functools.cache
def opened(family, head=None, **more):
    """(config, head, parameters in two segments) of a random torch model."""
    own, changes = CASES[family]
    head = head or own
    _, params, config = helpers.ours(helpers.torch_model(family, head, **changes, **more), head, cuts=(1,))
    return config, head, params


def some(config, names, **kept):
    """Random masks of these dimensions."""
    kept = {**KEPT, **kept}
    rng = np.random.default_rng(0)
    out = {}
    for name in names:
        rows = config.num_layers if name in ("heads", "mlp") else 1
        ranks = rng.random((rows, cut.sizes(config)[name])).argsort(1).argsort(1)
        out[name] = ranks < kept[name]
    return out


@functools.cache
def model(config, head, cuts):
    m = build.build(config, head=head, cuts=cuts)
    return jax.jit(lambda p: m.logits(m.head(p), m.hidden(p, helpers.batch(TOKENS, MASK))[0]))


def masked_logits(config, head, params, masks):
    """(parameters with masks, logits): all dimensions have masks, of ones where not told: one program serves all."""
    ones = {name: np.ones((config.num_layers if name in ("heads", "mlp") else 1, n)) for name, n in
            cut.sizes(config).items()}  # fmt: skip
    put = masked.put(params, {k: jnp.asarray(m, jnp.float32) for k, m in {**ones, **masks}.items()})
    return put, np.asarray(model(config, head, (1,))(put))[MASK > 0]


def check_cut(config, head, params, masks):
    """Masked equals cut; returns the logits and the smaller model."""
    put, expected = masked_logits(config, head, params, masks)
    small, smaller = cut.cut(cut.bare(put), masks, config)
    shapes = jax.eval_shape(build.build(smaller, head=head).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_allclose(np.asarray(model(smaller, head, ())(small))[MASK > 0], expected, atol=1e-5)
    return expected, small, smaller


def check_transformers(folder, expected, small, smaller, head):
    cut.check(smaller, head)
    hf.save(folder, small, smaller, head=head)
    theirs = helpers.CLASSES[head].from_pretrained(folder, attn_implementation="eager").eval()
    assert sum(p.numel() for p in theirs.parameters()) == sum(x.size for x in jax.tree.leaves(small))
    np.testing.assert_allclose(helpers.torch_logits(theirs, TOKENS, MASK)[MASK > 0], expected, atol=1e-4)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("family", CASES)
def test_cut_is_masked_and_transformers_agrees(family, dimension, tmp_path):
    config, head, params = opened(family)
    expected, small, smaller = check_cut(config, head, params, some(config, DIMENSIONS[dimension]))
    assert np.abs(expected - masked_logits(config, head, params, {})[1]).max() > 0.1
    if family not in OWN_HEAD_DIM and dimension in ("heads", "hidden", "all"):
        with pytest.raises(errors.ConfigError, match=r"cannot say.*the same part of heads and hidden"):
            cut.check(smaller, head)
    else:
        check_transformers(tmp_path, expected, small, smaller, head)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_where_a_head_is_a_part_of_the_width_both_are_cut(family, tmp_path):
    config, head, params = opened(family)
    assert cut.head_counts(config, head) == (4,)
    check_transformers(tmp_path, *check_cut(config, head, params, some(config, ("heads", "hidden"), heads=3)), head)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_classifiers(family, tmp_path):
    config, head, params = opened(family, "classification", num_labels=3)
    names = ("mlp", "depth") + (("hidden",) if family == "llama" else ("hidden", "heads"))
    expected, small, smaller = check_cut(config, head, params, some(config, names, heads=3))
    hf.save(tmp_path, small, smaller, head=head)
    theirs = helpers.CLASSES[head].from_pretrained(tmp_path, attn_implementation="eager").eval()
    last = np.cumsum(MASK.sum(1)) - 1 if family == "llama" else np.cumsum([0, *MASK.sum(1)[:-1]])
    np.testing.assert_allclose(helpers.torch_logits(theirs, TOKENS, MASK), expected[last], atol=1e-4)


def test_sorted_by_scores_and_cut_again():
    config, head, params = opened("llama")
    masks = some(config, KEPT)
    scores = {k: np.random.default_rng(1).random(m.shape) for k, m in masks.items()}
    expected = masked_logits(config, head, params, masks)[1]
    bare = cut.bare(params)
    small, smaller = cut.cut(bare, masks, config, scores)
    np.testing.assert_allclose(np.asarray(model(smaller, head, ())(small))[MASK > 0], expected, atol=1e-5)
    best = np.argsort(-np.where(masks["mlp"], scores["mlp"], -1), axis=1)[:, :29]
    layers = np.flatnonzero(masks["depth"][0])
    up = np.asarray(bare["layers"]["1"]["mlp"]["up"]["kernel"])
    hidden = np.argsort(-np.where(masks["hidden"], scores["hidden"], -1)[0])[:24]
    np.testing.assert_array_equal(
        small["layers"]["0"]["mlp"]["up"]["kernel"][1], up[layers[1] - 1][hidden][:, best[layers[1]]]
    )


def test_masks_are_read_where_they_stand():
    config, _, params = opened("qwen3")
    masks = some(config, KEPT)
    put = masked.put(params, {k: jnp.asarray(m, jnp.float32) for k, m in masks.items()})
    assert {k: m.tolist() for k, m in cut.masks(put, config).items()} == {k: m.tolist() for k, m in masks.items()}
    assert cut.masks(params, config) == {}
    twice = masked.put(put, {"mlp": jnp.asarray(~masks["mlp"], jnp.float32)})
    assert not cut.masks(twice, config)["mlp"].any()
    down = "layers/0/mlp/down/kernel"
    above = low_rank.LowRank(paths.get(put, down), jnp.zeros((1, 48, 1)), jnp.zeros((1, 1, 32)))
    with pytest.raises(errors.ConfigError, match=f"{down}: another method stands above the mask"):
        cut.masks(paths.replace(put, {down: above}), config)


def test_merging():
    """Masks of heads and MLP merge into kernels, and over layers into the gate; over the stream, they cannot."""
    config, head, params = opened("llama")
    put, expected = masked_logits(config, head, params, some(config, ("heads", "mlp", "depth")))
    flat = paths.flatten(put)
    flat.update({p: x.base for p, x in flat.items() if p.endswith("norm/scale")})
    merged = operators.densify(paths.unflatten(flat))
    np.testing.assert_allclose(np.asarray(model(config, head, (1,))(merged))[MASK > 0], expected, atol=1e-5)
    with pytest.raises(errors.NotLinear, match="norm/scale: a norm over kept entries"):
        operators.densify(put)


def test_what_cannot_be_cut():
    config, head, params = opened("llama")
    bare = cut.bare(params)
    uneven = some(config, ("mlp",))["mlp"]
    uneven[0, :] = True
    for masks, says in (
        ({"mlp": uneven}, r"keeps \[48, 29, 29\] units by layer"),
        ({"mlp": uneven[:1]}, r"shape \(1, 48\), expected \(3, 48\)"),
        ({"depth": np.zeros((1, 3))}, r"keeps \[0\]"),
        ({"width": uneven}, "no dimension 'width'"),
    ):
        with pytest.raises(errors.ConfigError, match=says):
            cut.cut(bare, masks, config)
    odd = dataclasses.replace(config, num_heads=3, num_kv_heads=3)
    with pytest.raises(errors.ConfigError, match="transformers refuses a llama"):
        cut.check(odd, head)
    with pytest.raises(Exception, match="not a multiple"):
        transformers.LlamaConfig(hidden_size=32, num_attention_heads=3)
    assert cut.head_counts(dataclasses.replace(config, num_kv_heads=4), head) == (1, 2, 4)
    for family in ("gpt2", "bert"):
        config, head, _ = opened(family)
        uneven = dataclasses.replace(config, num_heads=3, num_kv_heads=3, embed_dim=3 * config.head_dim + 1)
        with pytest.raises(errors.ConfigError, match="of 3 heads"):
            cut.check(uneven, head)
    with pytest.raises(ValueError, match="must be divisible"):
        transformers.GPT2Model(transformers.GPT2Config(vocab_size=8, n_embd=25, n_head=3, n_layer=1))
    with pytest.raises(ValueError, match="not a multiple"):
        transformers.BertModel(transformers.BertConfig(vocab_size=8, hidden_size=25, num_attention_heads=3))
