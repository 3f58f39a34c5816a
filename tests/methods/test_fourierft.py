"""FourierFT against HF PEFT, its places against torch's shuffle, its kernel against the sum of cosines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft_pair
import pytest
import tiny

from tunejax.core import errors
from tunejax.core.method import Context
from tunejax.methods import fourierft

torch = peft_pair.torch


@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_logits_and_gradients_equal_peft(family, tmp_path):
    config = functools.partial(peft_pair.peft.FourierFTConfig, n_frequency=40, scaling=30.0, random_loc_seed=5)
    peft_pair.check(
        family,
        tmp_path,
        config,
        {"name": "fourierft", "n_frequency": 40, "scaling": 30.0, "random_loc_seed": 5},
        lambda m, read: {"spectrum": read(m.fourierft_spectrum["default"])},
    )


@pytest.mark.parametrize(("size", "seed"), [(40, 777), (384, 0), (45056, 2**31 + 5), (5_000_000, 12)])
def test_places_are_torchs(size, seed):
    wanted = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:40].numpy()
    np.testing.assert_array_equal(fourierft.drawn(size, 40, seed), wanted)


def test_the_change_is_a_sum_of_cosines():
    fan_in, fan_out, n, scaling = 6, 5, 4, 3.0
    rng = np.random.default_rng(0)
    w, c = (rng.standard_normal(s).astype(np.float32) for s in ((fan_in, fan_out), n))
    rows, columns = np.divmod(fourierft.drawn(fan_in * fan_out, n, 7), fan_in)
    out, into = np.arange(fan_out)[:, None, None], np.arange(fan_in)[:, None]
    angles = 2 * np.pi * (rows * out / fan_out + columns * into / fan_in)
    change = scaling / (fan_in * fan_out) * (c * np.cos(angles)).sum(-1).T
    method = fourierft.fourierft("w/kernel", n, scaling, seed=7)
    op = method.bind({"w": {"kernel": jnp.asarray(w)}}, {"w/kernel": {"spectrum": jnp.asarray(c)}}, {}, Context())
    np.testing.assert_allclose(op["w"]["kernel"].dense(), w + change, atol=1e-5)


def test_more_coefficients_than_a_kernel_has_are_refused():
    with pytest.raises(errors.TargetError, match=r"16 x 8 has 128 coefficients; it needs at least n_frequency, 1000"):
        fourierft.fourierft("attention/v/kernel").init(jax.random.key(0), tiny.params())
    with pytest.raises(errors.ConfigError, match="n_frequency is 0"):
        fourierft.fourierft(n_frequency=0)
    with pytest.raises(errors.ConfigError, match="seed is -1"):
        fourierft.fourierft(seed=-1)
