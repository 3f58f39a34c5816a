"""Adapters of a module that keeps three kernels as one (GPT-2's c_attn), in folders of HF PEFT."""

import numpy as np
import pytest

from tunejax.core import errors

peft = pytest.importorskip("peft")
peft_side = pytest.importorskip("peft_side")

EVERY = "attention/{q,k,v}/kernel"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(folder, head) of a random model."""
    return peft_side.save_base("gpt2", tmp_path_factory.mktemp("gpt2"))


def test_a_shared_budget_of_ranks_is_read(gpt2, tmp_path):
    options = {"init_r": 3, "target_r": 2, "total_step": 9, "lora_alpha": 4, "fan_in_fan_out": True}
    theirs = peft_side.their_adapter(gpt2, "AdaLoraConfig", target_modules=["c_attn"], **options)
    theirs.save_pretrained(tmp_path)
    logits, found, _ = peft_side.read(tmp_path, gpt2)
    np.testing.assert_allclose(logits, peft_side.their_logits(theirs), atol=1e-5, rtol=1e-5)
    assert found.specs[0]["name"] == "adalora"


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_at_all_parts_is_written_and_read_back(gpt2, rslora, tmp_path):
    specs = [{"name": "dora", "rank": 2, "rslora": rslora, "targets": [EVERY, "mlp/up/kernel"]}]
    found, mine = peft_side.tuned(gpt2, specs)
    np.testing.assert_allclose(peft_side.write(tmp_path / "a", gpt2, found), mine, atol=1e-5, rtol=1e-5)
    logits, _, again = peft_side.read(tmp_path / "a", gpt2)
    np.testing.assert_allclose(logits, mine, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(peft_side.write(tmp_path / "b", gpt2, again), mine, atol=1e-5, rtol=1e-5)


def test_dora_at_some_parts_is_refused(gpt2, tmp_path):
    found, _ = peft_side.tuned(gpt2, [{"name": "dora", "rank": 2, "targets": "attention/{q,v}/kernel"}])
    with pytest.raises(errors.ConfigError, match=r"1 of 3 parts of one are not of the same dora; adapt all"):
        peft_side.write(tmp_path / "a", gpt2, found)
