"""Combining changes: against HF PEFT's add_weighted_adapter on one LoRA layer, and the papers' formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.core import combine, errors
from tunejax.core.combine import Factors

WEIGHTS = [0.7, -0.4, 0.9]
DENSITY = 0.45
NAMES = ["one", "two", "three"]
RNG = np.random.default_rng(0)
CHANGES = [RNG.standard_normal((5, 8)).astype(np.float32) for _ in WEIGHTS]


def equal(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def theirs():
    """PEFT's model of one linear layer under three LoRAs, the last of another rank and scale."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 10))

    def config(r, alpha):
        return peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)

    model = peft.get_peft_model(base, config(3, 5), adapter_name="one")
    model.add_adapter("two", config(3, 2))
    model.add_adapter("three", config(3, 3))
    model.add_adapter("wide", config(4, 2))
    return model


def site(model, name):
    """(factors as we hold them, scale) of an adapter."""
    layer = model.base_model.model[0]
    a, b = (getattr(layer, k)[name].weight.detach().numpy().T for k in ("lora_A", "lora_B"))
    return Factors(jnp.asarray(a), jnp.asarray(b)), layer.scaling[name]


def ours(model, names):
    return zip(*(site(model, n) for n in names), strict=True)


@pytest.mark.parametrize("how", ["linear", "ties", "magnitude_prune"])
def test_factors_as_peft_combines_them(theirs, how):
    theirs.add_weighted_adapter(NAMES, WEIGHTS, how, combination_type=how, density=DENSITY)
    parts, scales = ours(theirs, NAMES)
    found = combine.combined_factors(parts, scales, WEIGHTS, how, density=DENSITY)
    expected, scale = site(theirs, how)
    assert scale == 1
    jax.tree.map(equal, found, expected)


def test_ranks_stacked_as_peft_does_and_exactly_the_sum(theirs):
    names = ["one", "wide"]
    theirs.add_weighted_adapter(names, [0.7, -0.4], "cat", combination_type="cat")
    parts, scales = ours(theirs, names)
    weights = [w * s for w, s in zip([0.7, -0.4], scales, strict=True)]
    found = combine.stacked_ranks(parts, weights)
    jax.tree.map(equal, found, site(theirs, "cat")[0])
    equal(found.a @ found.b, sum(w * np.asarray(p.a @ p.b) for w, p in zip(weights, parts, strict=True)))
    grown = combine.stacked_ranks(parts, weights, rank=9)
    assert grown.a.shape == (6, 9)
    equal(grown.a @ grown.b, found.a @ found.b)


@pytest.mark.parametrize(("how", "name"), [("linear", "svd"), ("ties", "ties_svd")])
def test_whole_changes_as_peft_combines_and_truncates_them(theirs, how, name):
    theirs.add_weighted_adapter(NAMES, WEIGHTS, name, combination_type=name, density=DENSITY, svd_rank=2)
    parts, scales = ours(theirs, NAMES)
    changes = [s * p.a @ p.b for p, s in zip(parts, scales, strict=True)]
    a, b = combine.truncated(combine.combine(changes, WEIGHTS, how, density=DENSITY), 2)
    expected, _ = site(theirs, name)
    equal(a @ b, expected.a @ expected.b)


def test_a_product_of_more_rank_than_there_is_has_zeros():
    a, b = combine.truncated(jnp.asarray(CHANGES[0]), 7)
    assert a.shape == (5, 7)
    equal(a @ b, CHANGES[0])


def trim(x, density):
    kept = np.zeros(x.size, bool)
    kept[np.argsort(-np.abs(x).ravel())[: int(density * x.size)]] = True
    return np.where(kept.reshape(x.shape), x, 0)


def disjoint_mean(changes, weights):
    """Yadav et al., algorithm 1, steps 2 and 3; each change weighted after the election."""
    gamma = np.where(sum(changes) >= 0, 1, -1)
    agrees = [np.sign(c) == gamma for c in changes]
    total = sum(w * np.where(a, c, 0) for w, a, c in zip(weights, agrees, changes, strict=True))
    return total / np.maximum(sum(a.astype(int) for a in agrees), 1)


def test_ties_is_trim_elect_and_disjoint_mean():
    expected = disjoint_mean([trim(c, 0.3) for c in CHANGES], WEIGHTS)
    equal(combine.combine(CHANGES, WEIGHTS, "ties", density=0.3), expected)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_under_the_same_masks(how):
    key = jax.random.key(4)
    masks = [np.asarray(combine.drawn(jax.random.fold_in(key, i), (5, 8), 0.5)) for i in range(3)]
    assert 0.3 < np.mean(masks) < 0.7
    kept = [np.where(m, c / 0.5, 0) for m, c in zip(masks, CHANGES, strict=True)]
    expected = disjoint_mean(kept, WEIGHTS) if how == "dare_ties" else sum(map(np.multiply, WEIGHTS, kept))
    equal(combine.combine(CHANGES, WEIGHTS, how, density=0.5, key=key), expected)


def test_dare_keeps_the_mean():
    x = jnp.ones((100, 100))
    found = combine.combine([x], [1.0], "dare_linear", density=0.25, key=jax.random.key(0))
    assert set(np.unique(found)) == {0.0, 4.0}
    assert abs(float(found.mean()) - 1) < 0.05


def test_layers_are_pruned_each_by_itself():
    stacked = [np.stack([c, 100 * c[::-1]]) for c in CHANGES]
    found = combine.combine(stacked, WEIGHTS, "ties", density=0.3, each=True)
    for i in range(2):
        equal(found[i], combine.combine([s[i] for s in stacked], WEIGHTS, "ties", density=0.3))
    whole = combine.combine(stacked, WEIGHTS, "ties", density=0.3)
    assert np.abs(found - whole).max() > 1e-3


def test_a_task_is_taken_away_again():
    both = combine.combine(CHANGES[:2], [1, 1])
    equal(combine.combine([both, CHANGES[1]], [1, -1]), CHANGES[0])


def test_mistakes_are_told():
    with pytest.raises(errors.ConfigError, match=r"tie'\. Did you mean 'ties'"):
        combine.combine(CHANGES, WEIGHTS, "tie")
    with pytest.raises(errors.ConfigError, match="2 weights for 3 changes"):
        combine.combine(CHANGES, [1, 2])
    with pytest.raises(errors.ConfigError, match="density is 0"):
        combine.combine(CHANGES, WEIGHTS, "ties", density=0)
    with pytest.raises(errors.ConfigError, match="give a key"):
        combine.combine(CHANGES, WEIGHTS, "dare_ties", density=0.5)
    with pytest.raises(errors.ConfigError, match=r"one shape; found \[\(5, 8\), \(8, 5\)\]"):
        combine.combine([CHANGES[0], CHANGES[1].T], [1, 1])
