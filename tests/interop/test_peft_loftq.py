"""LoftQ's adapter under HF PEFT, on the rounded base: a plain LoRA there."""

import jax
import numpy as np
import pytest

from tunejax.core.method import Context
from tunejax.interop import hf
from tunejax.interop import peft as ours
from tunejax.methods import registry

peft = pytest.importorskip("peft")
side = pytest.importorskip("peft_side")


def test_on_the_rounded_base_peft_gives_the_same(tmp_path):
    base = side.save_base("llama", tmp_path / "base")
    config, spec = hf.read_config(base[0]), {"name": "loftq", "rank": 3, "block_size": 8}
    found, logits = side.tuned(base, [spec])
    ours.write(tmp_path / "adapter", found, config, head=base[1], base_name=str(base[0]))
    rounded = registry.build({"name": "quantize", "block_size": 8})
    start = rounded.init(jax.random.key(0), side.loaded(*base))
    hf.save(tmp_path / "rounded", rounded.merge(found.base, start.train, start.state), config, head=base[1])
    theirs = peft.PeftModel.from_pretrained(side.their_model(tmp_path / "rounded"), tmp_path / "adapter").eval()
    np.testing.assert_allclose(side.their_logits(theirs), logits, atol=2e-5)
    plain = found.method.bind(side.loaded(*base), found.train, found.state, Context())
    assert np.abs(side.our_logits(base, found.method, plain) - logits).max() > 1e-3  # the rounding is seen
