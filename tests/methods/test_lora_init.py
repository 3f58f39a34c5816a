"""PiSSA and OLoRA against HF PEFT: the same start, the same function of what trains, the same gradients."""

import functools
import math

import jax
import numpy as np
import peft_pair
import pytest
import tiny

from tunejax.core import errors
from tunejax.methods import lora_init, registry

NAMES = ("pissa", "olora")


def factors(m, read):
    return {"a": read(m.lora_A["default"].weight).T, "b": read(m.lora_B["default"].weight).T}


def config(name):
    return functools.partial(peft_pair.peft.LoraConfig, r=3, lora_alpha=5, init_lora_weights=name)


def first_factors(name, family, folder):
    """PEFT's first A and B by module."""
    theirs = peft_pair.peft.get_peft_model(
        peft_pair.torch_model(family, folder), config(name)(target_modules=list(peft_pair.SITES[family]))
    )
    return {k: v.detach().numpy().copy() for k, v in theirs.named_parameters() if "lora_" in k}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_logits_and_gradients_equal_peft(name, family, tmp_path):
    first = first_factors(name, family, tmp_path)
    moved = peft_pair.wrapped  # its weights are off their start; the first ones are those of `first`
    names = {}

    def remembered(*args):
        theirs = moved(*args)
        names.update({id(m): n for n, m in theirs.named_modules()})
        return theirs

    def state(m, read):
        at = names[id(m)]
        return {"a0": first[f"{at}.lora_A.default.weight"].T, "b0": first[f"{at}.lora_B.default.weight"].T}

    spec = {"name": name, "r": 3, "lora_alpha": 5.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_pair, "wrapped", remembered)
        peft_pair.check(family, tmp_path, config(name), spec, factors, state)


@pytest.mark.parametrize("name", NAMES)
def test_the_start_equals_peft(name, tmp_path):
    first = first_factors(name, "llama", tmp_path)
    params, _ = peft_pair.hf.load(tmp_path, peft_pair.hf.read_config(tmp_path), head="lm")
    start = getattr(lora_init, name)("mlp/{up,down}/kernel", rank=3, alpha=5.0).init(jax.random.key(0), params)
    for site in ("up", "down"):
        own = start.train[f"layers/0/mlp/{site}/kernel"]
        kept = start.state[f"layers/0/mlp/{site}/kernel"]
        np.testing.assert_array_equal(own["a"], kept["a0"])
        np.testing.assert_array_equal(own["b"], kept["b0"])
        for i in range(2):
            at = f"base_model.model.model.layers.{i}.mlp.{site}_proj"
            a, b = first[f"{at}.lora_A.default.weight"].T, first[f"{at}.lora_B.default.weight"].T
            # A decomposition is unique up to signs; the product is unique.
            np.testing.assert_allclose(own["a"][i] @ own["b"][i], a @ b, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(own["a"][i], axis=0), np.linalg.norm(a, axis=0), rtol=1e-4)


def test_pissa_takes_the_best_approximation():
    kernel = tiny.params()["layers"]["0"]["mlp"]["up"]["kernel"]
    train = lora_init.pissa("mlp/up/kernel", rank=3, alpha=5.0).init(jax.random.key(0), tiny.params()).train
    own = train["layers/0/mlp/up/kernel"]
    singular = np.linalg.svd(kernel, compute_uv=False)
    rest = np.linalg.svd(kernel - 5 / 3 * own["a"] @ own["b"], compute_uv=False)
    np.testing.assert_allclose(rest[:, 0], singular[:, 3], rtol=1e-4)


def test_a_rank_beyond_the_kernel_is_refused():
    with pytest.raises(errors.TargetError, match=r"rank is 17.*\(3, 16, 24\)"):
        lora_init.pissa("mlp/up/kernel", rank=17).init(jax.random.key(0), tiny.params())


@pytest.mark.parametrize("name", ["pissa", "olora", "dora"])
def test_a_kernel_that_has_no_values_is_named(name):
    second = {"name": name, "rank": 2, "targets": "mlp/down/kernel"}
    method = registry.build([{"name": "pfeiffer", "width": 4}, second])
    with pytest.raises(errors.TargetError, match=f"{name} .* of layers/0/mlp/down/kernel, .*; put {name} first"):
        jax.eval_shape(method.init, jax.random.key(0), tiny.params())


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "olora", "loftq", "adalora", "loha", "lokr", "krona"])
def test_alpha_is_a_number_other_than_zero(name):
    more = {"total_steps": 9} if name == "adalora" else {}
    for alpha in (0, math.inf, math.nan):
        with pytest.raises(errors.ConfigError, match=f"{name}: alpha is .*it must be a number other than 0"):
            registry.build({"name": name, "alpha": alpha, **more})
    if name in ("pissa", "loftq"):
        with pytest.raises(errors.ConfigError, match=f"{name}: alpha is -1.*it must be above 0"):
            registry.build({"name": name, "alpha": -1})
