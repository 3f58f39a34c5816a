"""Folders of HF PEFT as they are met: entries left out or of no effect, names told twice, damage, and other tasks."""

import numpy as np
import pytest

from tunejax.core import errors
from tunejax.interop import hf, peft_read
from tunejax.interop import peft as ours

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft_side = pytest.importorskip("peft_side")

BASES = ("llama", "bert", "bert mlm", "gpt2")
LINEAR = ["q_proj", "v_proj", "down_proj"]
quiet = pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA extension",
    "ignore:Setting boft_n_butterfly_factor",
    "ignore:The symmetric initialization can NOT",
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(folder, head) of random models by name."""
    return {name: peft_side.save_base(name, tmp_path_factory.mktemp("base")) for name in BASES}


ENTRIES = {
    "oft dropout": ("OFTConfig", {"oft_block_size": 4, "module_dropout": 0.1}, (), {}),
    "boft dropout": ("BOFTConfig", {"boft_block_size": 4, "boft_dropout": 0.1}, (), {}),
    "miss from random": ("MissConfig", {"r": 4, "init_weights": False}, (), {}),
    "miss without a start": ("MissConfig", {"r": 4}, ("init_weights",), {}),
    "hra without Gram-Schmidt": ("HRAConfig", {"r": 4}, ("apply_GS",), {}),
    "hra of an odd rank": ("HRAConfig", {"r": 3}, (), {}),
    "mica": ("LoraConfig", {"r": 2, "init_lora_weights": "mica"}, (), {}),
    "nulls": ("LoraConfig", {"r": 2}, (), {"use_rslora": None, "use_dora": None}),
    "a pattern alone": ("LoraConfig", {"r": 8, "rank_pattern": {"q_proj": 2}}, ("r",), {}),
    "adalora of rank 12": ("AdaLoraConfig", {"total_step": 9, "init_r": 12}, ("init_r",), {}),
}  # fmt: skip
"""What is told -> (PEFT's config, its arguments, entries taken away, entries put in)."""


@quiet
@pytest.mark.parametrize("kind", ENTRIES)
def test_what_changes_nothing_is_read(bases, kind, tmp_path):
    name, arguments, removed, entries = ENTRIES[kind]
    theirs = peft_side.their_adapter(bases["llama"], name, target_modules=LINEAR, **arguments)
    theirs.save_pretrained(tmp_path)
    peft_side.change(tmp_path, *removed, **entries)
    again = peft.PeftModel.from_pretrained(peft_side.their_model(bases["llama"][0]), tmp_path).eval()
    logits = peft_side.their_logits(theirs.double())
    np.testing.assert_allclose(peft_side.their_logits(again.double()), logits, atol=1e-6)
    ours_of_it, _, found = peft_side.read(tmp_path, bases["llama"])
    np.testing.assert_allclose(ours_of_it, logits, atol=1e-5, rtol=1e-5)
    written = peft_side.write(tmp_path / "again", bases["llama"], found)
    np.testing.assert_allclose(written, logits, atol=1e-5, rtol=1e-5)


def test_a_kind_without_its_variant_is_not_offered_itself(bases, tmp_path):
    peft_side.their_adapter(bases["llama"], "HRAConfig", r=4, target_modules=LINEAR).save_pretrained(tmp_path)
    peft_side.change(tmp_path, apply_GS=True)
    with pytest.raises(errors.CheckpointError, match=r"HRA with apply_GS: True is not known here$"):
        peft_side.read(tmp_path, bases["llama"])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_kernel_that_is_saved_under_its_adapter_is_read(bases, factor, tmp_path):
    """PEFT saves the head's own where that is adapted, and loads it into the base; it is written here too."""
    options = {"r": 2, "target_modules": ["q_proj", "lm_head"]}
    peft_side.their_adapter(bases["llama"], "LoraConfig", **options).save_pretrained(tmp_path)
    own = f"{ours.PREFIX}lm_head.base_layer.weight"
    peft_side.change_tensors(tmp_path, lambda t: {**t, own: factor * t[own]})
    theirs = peft.PeftModel.from_pretrained(peft_side.their_model(bases["llama"][0]), tmp_path).eval()
    logits, _, found = peft_side.read(tmp_path, bases["llama"])
    np.testing.assert_allclose(logits, peft_side.their_logits(theirs), atol=1e-5, rtol=1e-5)
    again = peft_side.write(tmp_path / "again", bases["llama"], found)
    np.testing.assert_allclose(again, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_bias_with_two_names_is_one(bases, tmp_path):
    theirs = peft_side.their_adapter(bases["bert mlm"], "LoraConfig", r=2, target_modules=["query"], bias="all")
    theirs.save_pretrained(tmp_path)
    logits = peft_side.read(tmp_path, bases["bert mlm"])[0]
    np.testing.assert_allclose(logits, peft_side.their_logits(theirs), atol=1e-5, rtol=1e-5)
    twin = f"{ours.PREFIX}cls.predictions.decoder.bias"
    peft_side.change_tensors(tmp_path, lambda t: {**t, twin: t[twin] + 1})
    with pytest.raises(errors.CheckpointError, match=r"decoder\.bias and .*predictions\.bias are one"):
        peft_side.read(tmp_path, bases["bert mlm"])


def first_rows(tensors):
    return {k: x[0] for k, x in tensors.items()}


LORA = ("LoraConfig", {"r": 3})
DAMAGE = {
    "no tensors": (*LORA, {}, lambda t: {}, "holds no tensors"),
    "a list of ranks": (*LORA, {"rank_pattern": [1]}, None, r"rank_pattern is \[1\]; expected numbers by"),
    "no expression": (*LORA, {"rank_pattern": {"*q": 3}}, None, r"rank_pattern is .*nothing to repeat"),
    "no number": (*LORA, {"alpha_pattern": {"q_proj": "x"}}, None, r"alpha_pattern is .*could not convert"),
    "another LoKr": ("LoKrConfig", {"r": 8}, {"r": 1}, None, r"attention/q/kernel has k1, k2; .* need a2"),
    "a lower rank": (
        "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9}, {"init_r": 2}, None,
        r"layers.0.self_attn.q_proj is no adalora of .*'rank': 2.*; found .*lora_A \(4, 16\)",
    ),
    "a flat BOFT": ("BOFTConfig", {"boft_block_size": 4}, {}, first_rows, r"q_proj is no boft .*boft_R \(4, 4, 4\)"),
    "a scalar IA3": (
        "IA3Config", {"feedforward_modules": []}, {}, lambda t: first_rows(first_rows(t)),
        r"q_proj is no ia3 .*ia3_l \(\)",
    ),
    "layers of two shapes": (
        *LORA, {}, lambda t: {k: x[:2] if "layers.1" in k and "lora_A" in k else x for k, x in t.items()},
        r"a at layers/attention/q/kernel has shape \(16, 2\), expected \(16, 3\)",
    ),
}  # fmt: skip
"""What is wrong -> (PEFT's config, its arguments, entries put in, what happens to the tensors, what is said)."""


@quiet
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_told(bases, kind, tmp_path):
    name, arguments, entries, how, said = DAMAGE[kind]
    theirs = peft_side.their_adapter(bases["llama"], name, target_modules=["q_proj"], **arguments)
    theirs.save_pretrained(tmp_path)
    peft_side.change(tmp_path, **entries)
    if how is not None:
        peft_side.change_tensors(tmp_path, how)
    with pytest.raises(errors.CheckpointError, match=said):
        peft_side.read(tmp_path, bases["llama"])


def test_pickled_weights_are_never_read(bases, tmp_path):
    theirs = peft_side.their_adapter(bases["llama"], "LoraConfig", r=2, target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(errors.CheckpointError, match=r"adapter_model\.bin is pickled.*save_pretrained"):
        peft_side.read(tmp_path, bases["llama"])


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_another_task_is_named(bases, task, tmp_path):
    peft_side.their_adapter(bases["bert"], "LoraConfig", r=2, target_modules=["query"]).save_pretrained(tmp_path)
    peft_side.change(tmp_path, task_type=task)
    with pytest.raises(errors.CheckpointError, match=f"task_type is '{task}'; known here are CAUSAL_LM, SEQ_CLS"):
        peft_side.read(tmp_path, bases["bert"])


@pytest.mark.parametrize(("name", "targets"), [("bert mlm", ["query"]), ("llama", LINEAR), ("gpt2", ["c_attn"])])
def test_an_adapter_of_a_model_without_a_head_is_read(bases, name, targets, tmp_path):
    """Its modules lack the first part of their names."""
    base, options = bases[name], {"r": 2, "target_modules": targets, "fan_in_fan_out": name == "gpt2"}
    with_head = peft_side.their_adapter(base, "LoraConfig", **options)
    body = transformers.AutoModel.from_pretrained(base[0]).eval()
    theirs = peft.get_peft_model(body, peft.LoraConfig(task_type="FEATURE_EXTRACTION", **options)).eval()
    random = dict(with_head.named_parameters())
    with torch.no_grad():
        for k, p in theirs.named_parameters():
            if p.requires_grad:
                p.copy_(next(x for n, x in random.items() if n.endswith(k.removeprefix("base_model.model"))))
    theirs.save_pretrained(tmp_path)
    logits = peft_side.read(tmp_path, base)[0]
    np.testing.assert_allclose(logits, peft_side.their_logits(with_head), atol=1e-5, rtol=1e-5)
    assert peft_read.read(tmp_path, hf.read_config(base[0]), head=base[1]).specs[0]["name"] == "lora"


def test_an_adapter_for_that_task_of_a_model_with_a_head_is_read(bases, tmp_path):
    """PEFT asks for no model of that kind."""
    base = bases["bert mlm"]
    theirs = peft_side.their_adapter(base, "LoraConfig", r=2, target_modules=["query"])
    theirs.save_pretrained(tmp_path)
    peft_side.change(tmp_path, task_type="FEATURE_EXTRACTION")
    logits = peft_side.read(tmp_path, base)[0]
    np.testing.assert_allclose(logits, peft_side.their_logits(theirs), atol=1e-5, rtol=1e-5)
