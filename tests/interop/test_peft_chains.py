"""Chains of methods in one folder of HF PEFT: what goes there together, and what its model has no place for."""

import pytest

from tunejax.core import errors

pytest.importorskip("peft")
import peft_side

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
