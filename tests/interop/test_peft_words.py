"""A description in HF PEFT's words trains what PEFT does of the same words: its tensors, scaled as there."""

import numpy as np
import pytest

from tunejax.config import load
from tunejax.core import errors
from tunejax.interop import hf
from tunejax.interop import peft as ours
from tunejax.methods import registry

peft = pytest.importorskip("peft")
side = pytest.importorskip("peft_side")

LORA = {"r": 4, "lora_alpha": 8}
WORDS = {
    "llama": {
        "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"down_proj": 5}, "modules_to_save": ["lm_head", "embed_tokens"],
    },
    "llama classes": {"target_modules": "all-linear", "rank_pattern": {"mlp.up_proj": 2}, "modules_to_save": ["score"]},
    "qwen3": {"target_modules": ["self_attn.k_proj", "mlp.gate_proj", "o_proj"], "exclude_modules": ["o_proj"]},
    "gpt2": {"target_modules": ["attn.c_proj", "c_fc"], "rank_pattern": {"c_fc": 2}},
    "bert": {
        "target_modules": "all-linear", "rank_pattern": {"dense": 3}, "modules_to_save": ["pooler", "classifier"],
        "exclude_modules": ["lm_head", "key"],
    },
    "bert mlm": {"target_modules": ["query", "dense"], "rank_pattern": {"dense": 3}, "alpha_pattern": {"query": 2}},
    "gpt2 norms": {"target_modules": ["c_fc"], "modules_to_save": ["ln_1", "ln_f"]},
    "llama norms": {"target_modules": "all-linear", "modules_to_save": ["norm", "down_proj"]},
    "qwen3 norms": {"target_modules": ["k_proj"], "modules_to_save": ["norm"]},
}  # fmt: skip


@pytest.fixture(params=WORDS, scope="module")
def named(request, tmp_path_factory):
    """(name, (folder, head)) of a base."""
    return request.param, side.save_base(request.param.removesuffix(" norms"), tmp_path_factory.mktemp("base"))


def trained(model):
    """Shape by name of what trains of a PEFT model, whichever module above a kernel is saved."""
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad and "original_module" not in k]
    return {k.replace("modules_to_save.default.", ""): tuple(p.shape) for k, p in named}


def scales(model):
    """What PEFT multiplies each adapted module's product by."""
    return {k: m.scaling["default"] for k, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def test_the_same_trains_as_under_peft(named, tmp_path):
    name, base = named
    words = {**WORDS[name], **LORA}
    found, logits = side.tuned(base, registry.spelled_out([{"name": "lora", **words}]))
    ours.write(tmp_path, found, hf.read_config(base[0]), head=base[1], base_name=str(base[0]))
    read = peft.PeftModel.from_pretrained(side.their_model(base[0]), tmp_path, is_trainable=True).eval()
    theirs = side.their_adapter(base, "LoraConfig", fan_in_fan_out=name.startswith("gpt2"), **words)
    assert scales(read) == scales(theirs)
    assert trained(read) == trained(theirs)
    np.testing.assert_allclose(side.their_logits(read), logits, atol=2e-5)


def test_in_a_config_they_become_several_methods():
    spec = {"name": "dora", "r": 4, "rank_pattern": {"q_proj": 2, "v_proj": 2}, "target_modules": ["q_proj", "v_proj"],
            "alpha_pattern": None, "modules_to_save": ["lm_head"]}  # fmt: skip
    raw = {"output_dir": "runs/x", "data": {"path": "x.jsonl"}, "method": spec}
    assert load.check(raw).method == [
        {"name": "dora", "target_modules": ["{attention/q,attention/v}/kernel"], "rank": 2},
        {"name": "full", "targets": ["/head/*"]},
    ]
    scaled = {"name": "lora", "learning_rate_scale": 0.1, "modules_to_save": ["lm_head"]}
    assert all(s["learning_rate_scale"] == 0.1 for s in load.check({**raw, "method": scaled}).method)
    plain = {"name": "lora", "r": 4, "rank_pattern": {}, "modules_to_save": None}
    assert load.check({**raw, "method": plain}).method == {"name": "lora", "r": 4}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern: 'q_prj' is none of what lora targets"),
        ({"targets": "mlp/**", "alpha_pattern": {"q_proj": 2}}, "'q_proj' is none of what lora targets"),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, "chain a method with 'layers' of its own"),
        ({"rank_pattern": 3}, "rank_pattern is 3; expected numbers by names of modules"),
        ({"rank_pattern": {"q_proj": "two"}}, "rank: expected a valid integer, found 'two'"),
        ({"modules_to_save": "classifier"}, "is 'classifier'; expected a list of names of modules"),
        ({"exclude_modules": "lm_had"}, "'lm_had' is no module's name. Did you mean 'lm_head'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["query"]}, "leave nothing to adapt"),
        ({"targets": 3, "rank_pattern": {"q_proj": 2}}, "targets: expected a valid string or a valid list, found 3"),
        ({"name": "vera", "rank_pattern": {"q_proj": 2}}, "rank_pattern: unknown"),
    ],
)
def test_what_cannot_be_meant_is_said(words, says):
    with pytest.raises(errors.ConfigError, match=says):
        registry.build({"name": "lora", **words})
