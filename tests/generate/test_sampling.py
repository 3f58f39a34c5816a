"""The filters against transformers' logits processors, and drawing against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.core import errors
from tunejax.generate import sampling as s

LOGITS = np.random.default_rng(0).normal(0, 2.5, (6, 37)).astype(np.float32)

CASES = [
    s.Sampling(temperature=0.7),
    s.Sampling(temperature=1.3, top_k=5),
    s.Sampling(temperature=1.0, top_k=100),
    s.Sampling(temperature=1.0, top_p=0.6),
    s.Sampling(temperature=1.0, top_p=0.01),
    s.Sampling(temperature=0.8, min_p=0.2),
    s.Sampling(temperature=1.0, min_p=1.0),
    s.Sampling(temperature=1.5, top_k=12, top_p=0.8, min_p=0.05),
]


def theirs(logits, how):
    """The same filters by transformers, in the order in which its `generate` applies them."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as lp

    steps = [lp.TemperatureLogitsWarper(how.temperature)] if how.temperature != 1 else []
    steps += [lp.TopKLogitsWarper(how.top_k)] if how.top_k else []
    steps += [lp.TopPLogitsWarper(how.top_p)] if how.top_p else []
    steps += [lp.MinPLogitsWarper(how.min_p)] if how.min_p else []
    x = torch.tensor(logits)
    for step in steps:
        x = step(None, x)
    return x.numpy()


@pytest.mark.parametrize("how", CASES)
def test_filters_equal_transformers(how):
    ours = np.asarray(s.filtered(jnp.asarray(LOGITS), how))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs(LOGITS, how)))
    np.testing.assert_allclose(ours, theirs(LOGITS, how), rtol=1e-6)


def test_filters_keep_ties_with_the_kth():
    logits = jnp.asarray([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert np.isinf(np.asarray(s.top_k(logits, 2))).tolist() == [[True, False, False, False, True]]


def test_greedy_ignores_the_filters_and_takes_the_first_of_equals():
    logits = jnp.asarray([[1.0, 5.0, 5.0], [9.0, 0.0, 9.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert s.draw(logits, s.Sampling(top_k=1), keys).tolist() == [1, 0]


def test_draws_follow_the_filtered_distribution():
    how = s.Sampling(temperature=0.9, top_k=4)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[:1]), (20_000, 37))
    drawn = np.asarray(s.draw(logits, how, jax.random.split(jax.random.key(1), 20_000)))
    expected = np.asarray(jax.nn.softmax(s.filtered(jnp.asarray(LOGITS[0]), how)))
    np.testing.assert_allclose(np.bincount(drawn, minlength=37) / 20_000, expected, atol=0.015)


@pytest.mark.parametrize(
    ("how", "word"),
    [
        (s.Sampling(temperature=-1), "temperature is -1"),
        (s.Sampling(top_k=0), "top_k is 0"),
        (s.Sampling(top_p=0.0), "top_p is 0"),
        (s.Sampling(min_p=1.5), "min_p is 1.5"),
    ],
)
def test_values_out_of_range_are_refused(how, word):
    with pytest.raises(errors.ConfigError, match=word):
        s.check(how)
