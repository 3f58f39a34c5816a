"""LoKr and KronA against HF PEFT."""

import functools

import jax
import numpy as np
import peft_pair
import pytest

from tunejax.core import errors
from tunejax.methods import lokr

CASES = {
    "both whole": {"r": 8, "decompose_both": False},
    "second thin": {"r": 1, "decompose_both": False},
    "both thin": {"r": 1, "decompose_both": True},
    "factor": {"r": 1, "decompose_both": False, "decompose_factor": 2},
}


def arrays(m, read):
    """Each of PEFT's factors, whole or a product, by our names."""
    theirs = {
        "k1": m.lokr_w1,
        "a1": m.lokr_w1_b,
        "b1": m.lokr_w1_a,
        "k2": m.lokr_w2,
        "a2": m.lokr_w2_b,
        "b2": m.lokr_w2_a,
    }
    return {name: read(p["default"]).T for name, p in theirs.items() if "default" in p}


@pytest.mark.parametrize(("family", "case"), [*(("llama", c) for c in CASES), ("bert", "second thin")])
def test_logits_and_gradients_equal_peft(family, case, tmp_path):
    config = functools.partial(peft_pair.peft.LoKrConfig, alpha=5, **CASES[case])
    peft_pair.check(family, tmp_path, config, {"name": "lokr", "alpha": 5.0, **CASES[case]}, arrays)


def test_krona_equals_peft_with_whole_factors(tmp_path):
    config = functools.partial(peft_pair.peft.LoKrConfig, alpha=20, r=8)
    peft_pair.check("llama", tmp_path, config, {"name": "krona", "alpha": 2.5}, arrays)


@pytest.mark.parametrize("factor", [-1, 1, 4, 7])
def test_divisors_equal_pefts(factor):
    from peft.tuners.lokr.layer import factorization

    for size in (*range(1, 130), 768, 4096, 11008):
        assert lokr.divisors(size, factor) == factorization(size, factor), size


def test_the_change_is_a_kronecker_product():
    rng = np.random.default_rng(0)
    w, k1, k2, x = (rng.standard_normal(s).astype(np.float32) for s in ((6, 20), (2, 4), (3, 5), (7, 6)))
    op = lokr.Kronecker(*map(jax.numpy.asarray, (w, k1, k2)), scale=0.5)
    np.testing.assert_allclose(op(jax.numpy.asarray(x)), x @ (w + 0.5 * np.kron(k1, k2)), atol=1e-5)
    np.testing.assert_allclose(op.dense(), w + 0.5 * np.kron(k1, k2), atol=1e-6)


def test_a_factor_of_zero_is_refused():
    with pytest.raises(errors.ConfigError, match="factor is 0"):
        lokr.krona(factor=0)
