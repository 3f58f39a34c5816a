"""LoHa against HF PEFT."""

import functools

import peft_pair
import pytest


@pytest.mark.parametrize("family", peft_pair.FAMILIES)
def test_logits_and_gradients_equal_peft(family, tmp_path):
    def train(m, read):
        theirs = {"a1": m.hada_w1_b, "b1": m.hada_w1_a, "a2": m.hada_w2_b, "b2": m.hada_w2_a}
        return {name: read(p["default"]).T for name, p in theirs.items()}

    config = functools.partial(peft_pair.peft.LoHaConfig, r=3, alpha=5)
    peft_pair.check(family, tmp_path, config, {"name": "loha", "r": 3, "alpha": 5.0}, train)
