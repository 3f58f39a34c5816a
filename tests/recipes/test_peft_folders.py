"""Folders of HF PEFT where a run may stand: heads, what is missing, and what is written of a run."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.core import errors
from tunejax.core.model import full_batch
from tunejax.recipes import artefact

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 20, (1, 7)).astype(np.int32)
SIZES = {"vocab_size": 20, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(pad_token_id=0, max_position_embeddings=64, **SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=0
    ),
    "bert": lambda: transformers.BertConfig(max_position_embeddings=64, **SIZES),
}
TARGETS = {"llama": ["q_proj"], "gpt2": ["c_attn"], "bert": ["query"]}


def base(folder, kind, model=None):
    """A checkpoint of random weights with a tokenizer, by default of a language model."""
    torch.manual_seed(0)
    model = model or (transformers.BertForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM.from_config)
    model(CONFIGS[kind]()).save_pretrained(folder)
    worlds.tokenizer_files(folder)
    return folder


def classifier(folder, base_folder, kind, **options):
    """A folder with LoRA and a head of three classes; the model that wrote it."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=TARGETS[kind], r=2, fan_in_fan_out=kind == "gpt2", **options
    )
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.1)
    wrapped.save_pretrained(folder)
    return wrapped


def logits(tuned):
    model = tuned.parts.model
    found = model.logits(model.head(tuned.params), model.hidden(tuned.params, full_batch(jnp.asarray(TOKENS)))[0])
    return found[:, 0] if tuned.parts.model_config.kind == "encoder" else found[:, -1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_head_of_a_folder_says_how_many_classes_there_are(tmp_path, kind):
    """The base, a language model, says 2, which is what every config says that does not name its classes."""
    options = {"modules_to_save": ["pooler", "classifier"]} if kind == "bert" else {}
    theirs = classifier(tmp_path / "adapter", base(tmp_path / "base", kind), kind, **options)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    assert expected.shape == (1, 3)
    np.testing.assert_allclose(logits(artefact.open_run(str(tmp_path / "adapter"))), expected, atol=1e-5)


def test_what_neither_folder_nor_base_has_is_named(tmp_path):
    bert, llama = tmp_path / "bert", tmp_path / "llama"
    classifier(bert / "adapter", base(bert / "base", "bert"), "bert")
    with pytest.raises(errors.CheckpointError, match=r"neither it nor its base .* has .*pooler/"):
        artefact.open_run(str(bert / "adapter"))
    classifier(llama / "adapter", base(llama / "base", "llama"), "llama")
    file = llama / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.load_file(file)
    safetensors.save_file({k: x for k, x in tensors.items() if "score" not in k}, file)
    with pytest.raises(errors.CheckpointError, match=r"neither it nor its base .* has head/kernel"):
        artefact.open_run(str(llama / "adapter"))


def tuned(tmp_path, method, *changes):
    """A short run of masked language modelling; its folder."""
    base(tmp_path / "bert", "bert")
    data = worlds.jsonl(tmp_path / "texts.jsonl", [{"text": row["prompt"]} for row in worlds.ROWS])
    worlds.make(tmp_path)
    out = [f"output_dir={tmp_path / 'run'}", f"model.path={tmp_path / 'bert'}", "objective.name=masked_lm"]
    tokenizer = tmp_path / "bert" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace('"unk_token"', '"mask_token": "<unk>", "unk_token"'))
    rows = [f"data.path={data}", "data.eval_path=null", "train.max_steps=2"]
    assert cli.main(["train", str(tmp_path / "my.yaml"), *out, *rows, f"method={method}", *changes]) == 0
    return tmp_path / "run"


def test_a_masked_language_model_is_read_back(tmp_path):
    run = tuned(tmp_path, "{name: lora, rank: 2, targets: attention/q/kernel}", "train.learning_rate=0.1")
    assert cli.main(["export", str(run), "--format", "peft", "--output", str(tmp_path / "out")]) == 0
    again = artefact.open_run(str(tmp_path / "out"))
    assert again.parts.config.model.head == "mlm"
    np.testing.assert_allclose(logits(again), logits(artefact.open_run(str(run))), atol=1e-6)
    data = worlds.jsonl(tmp_path / "more.jsonl", [{"text": "red cat"}, {"text": "blue dog"}])
    assert cli.main(["evaluate", str(tmp_path / "out"), f"data.eval_path={data}"]) == 0


def test_a_module_that_holds_others_is_not_written(tmp_path, capsys):
    run = tuned(tmp_path, "[{name: lora, rank: 2, targets: attention/q/kernel}, {name: full, targets: /mlm/bias}]")
    assert cli.main(["export", str(run), "--format", "peft", "--output", str(tmp_path / "out")]) == 2
    assert "PEFT saves whole modules: cls.predictions, of which something trains, holds" in capsys.readouterr().err


def test_a_base_that_was_rounded_is_told(tmp_path, capsys):
    run = tuned(tmp_path, "[{name: quantize, block_size: 8}, {name: lora, rank: 2, targets: attention/q/kernel}]")
    capsys.readouterr()
    assert cli.main(["export", str(run), "--format", "peft", "--output", str(tmp_path / "out")]) == 0
    assert "note: the run rounded its base" in capsys.readouterr().out


@pytest.mark.parametrize(
    "method", ["{name: lora, targets: []}", "{name: bitfit, targets: []}", "{name: vera, targets: []}"]
)
def test_no_target_is_told(tmp_path, capsys, method):
    config = worlds.make(tmp_path)
    assert cli.main(["train", str(config), f"method={method}"]) == 2
    assert "list of targets is empty" in capsys.readouterr().err
