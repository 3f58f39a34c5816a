"""Chains of methods in one folder of HF PEFT: what goes there together, and what its model has no place for."""

import numpy as np
import pytest

from tunejax.core import errors
from tunejax.interop import hf
from tunejax.interop import peft as ours

pytest.importorskip("peft")
peft_side = pytest.importorskip("peft_side")

BASES = ("llama", "qwen3", "bert", "gpt2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(folder, head) of random models by name."""
    return {name: peft_side.save_base(name, tmp_path_factory.mktemp(name)) for name in BASES}


def refused(base, specs, folder, said):
    found, _ = peft_side.tuned(base, specs)
    with pytest.raises(errors.ConfigError, match=said):
        peft_side.write(folder, base, found)
    assert not folder.exists()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("targets", ["attention/q/kernel", "attention/v/kernel"])
def test_a_bias_that_the_base_lacks_is_refused(bases, family, targets, tmp_path):
    """Beside an adapter of its module, and of a module that has none: PEFT drops both without a word."""
    specs = [{"name": "lora", "rank": 2, "targets": targets}, {"name": "bitfit", "targets": "attention/q/bias"}]
    refused(bases[family], specs, tmp_path / "a", r"q/bias trains, and the base has no such bias.*--format hf")


TOGETHER = {
    "norms of two parts": [{"name": "norm_tuning", "layers": ":1"}, {"name": "norm_tuning", "layers": "2:"}],
    "two rates of dropout": [
        {"name": "lora", "rank": 2, "dropout": 0.1, "targets": "mlp/up/kernel"},
        {"name": "lora", "rank": 2, "targets": "mlp/down/kernel"},
    ],
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", TOGETHER)
def test_parts_of_one_kind_go_together(bases, kind, tmp_path):
    found, mine = peft_side.tuned(bases["llama"], TOGETHER[kind])
    np.testing.assert_allclose(peft_side.write(tmp_path / "a", bases["llama"], found), mine, atol=1e-5, rtol=1e-5)
    logits, _, again = peft_side.read(tmp_path / "a", bases["llama"])
    np.testing.assert_allclose(logits, mine, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(peft_side.write(tmp_path / "b", bases["llama"], again), mine, atol=1e-5, rtol=1e-5)


APART = {
    "n_frequency": ("fourierft", 4, 5),
    "block_size": ("oft", 4, 2),
    "factors": ("boft", 1, 2),
}
"""Argument that PEFT has once a folder -> (method, two values)."""


@pytest.mark.parametrize("argument", APART)
def test_the_argument_that_keeps_two_apart_is_named(bases, argument, tmp_path):
    name, one, other = APART[argument]
    specs = [
        {"name": name, argument: one, "targets": "attention/q/kernel"},
        {"name": name, argument: other, "targets": "attention/v/kernel"},
    ]
    refused(bases["llama"], specs, tmp_path / "a", f"one {argument} in a folder; here are {name} with {one} and")


NOTED = {
    "prefix": ("bert", {"name": "prefix_tuning", "length": 3}, "forward() names past_key_values"),
    "butterflies": ("llama", {"name": "boft", "factors": 2, "targets": "mlp/up/kernel"}, "CUDA extension"),
    "prompt": ("bert", {"name": "prompt_tuning", "length": 3}, ""),
    "blocks": ("llama", {"name": "boft", "targets": "mlp/up/kernel"}, ""),
}
"""What is exported -> (base, method, what is said of it)."""


@pytest.mark.parametrize("kind", NOTED)
def test_what_peft_may_not_run_is_told(bases, kind, tmp_path, capsys):
    name, spec, said = NOTED[kind]
    folder, head = bases[name]
    found, _ = peft_side.tuned(bases[name], [spec])
    ours.write(tmp_path / "a", found, hf.read_config(folder), head=head, base_name="b")
    out = capsys.readouterr().out
    assert said in out
    assert ("note:" in out) == bool(said)
