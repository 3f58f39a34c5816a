import jax
import numpy as np
import pytest
import tiny

from tunejax.core import errors, paths
from tunejax.core import method as methods
from tunejax.core.method import Context
from tunejax.methods import norms

KEY = jax.random.key(0)


@pytest.mark.parametrize(("config", "head"), [(tiny.LLAMA, "lm"), (tiny.BERT, "mlm"), (tiny.BERT, "classification")])
def test_every_norm_and_nothing_else(config, head):
    m, p = tiny.model(config, head), tiny.params(config, head)
    start = norms.norm_tuning().init(KEY, p)
    wanted = {k for k in paths.flatten(p) if "norm" in k}
    assert set(start.train) == set(start.edits) == wanted
    assert {"lm": "norm/scale", "mlm": "mlm/norm/bias", "classification": "embed_norm/bias"}[head] in wanted
    base = methods.apply_edits(p, start.edits)
    bound = norms.norm_tuning().bind(base, start.train, {}, Context())
    np.testing.assert_array_equal(tiny.outputs(m, p), tiny.outputs(m, bound))


def test_targets_and_layers():
    method = norms.norm_tuning("attention/norm/*", layers="-1:")
    assert method.cuts(3) == (2,)
    assert set(method.init(KEY, tiny.params(cuts=(2,))).train) == {"layers/1/attention/norm/scale"}


def test_nothing_matched():
    with pytest.raises(errors.TargetError, match="mlp/norm/scale"):
        norms.norm_tuning("mlp/norm/scales").init(KEY, tiny.params())
