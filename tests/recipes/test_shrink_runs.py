"""Shrinking by whole commands: a run that masks, resumed to the same bytes, cut, and loaded by transformers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import numpy as safetensors

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.core.model import full_batch
from tunejax.models import cost, cut
from tunejax.recipes import artefact

SPEC = "method=[{name: full}, {name: shrink, keep: {heads: 0.5, mlp: 0.5, depth: 0.5}, steps: 3, every: 1}]"
QUICK = ["train.max_steps=6", "generation.num_samples=0", "evaluation.exact_match=false"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a finished run."""
    folder = tmp_path_factory.mktemp("world")
    assert cli.main(["train", str(worlds.make(folder)), SPEC, *QUICK]) == 0
    return folder


def test_the_cut_model_is_what_the_run_says(world, tmp_path, capsys):
    out = tmp_path / "small"
    assert cli.main(["shrink", str(world / "run"), str(out), "--batch", "2", "--length", "8"]) == 0
    said = capsys.readouterr().out
    tuned = artefact.open_run(str(world / "run"))
    tokens = np.random.default_rng(0).integers(0, 20, (2, 8)).astype(np.int32)
    model, params = tuned.parts.model, tuned.params
    expected = model.logits(model.head(params), model.hidden(params, full_batch(tokens))[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(tokens, dtype=torch.long)).logits
    np.testing.assert_allclose(found, expected, atol=1e-4)
    c = theirs.config
    assert (c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) == (1, 1, 1, 12)
    numbers = json.loads((out / "shrink.json").read_text())
    assert numbers["after"]["parameters"] == sum(p.numel() for p in theirs.parameters())
    assert numbers["difference"] < 1e-5
    assert numbers["kept"] == {"heads": "1 of 2", "mlp": "12 of 24", "depth": "1 of 2"}
    for name in ("parameters", "flops_per_token", "latency_ms"):
        assert numbers["before"][name] > 0
        assert name in said
    assert (
        transformers.AutoTokenizer.from_pretrained(out)("cat")["input_ids"] == tuned.parts.tokenizer("cat")["input_ids"]
    )
    assert cli.main(["generate", str(out), "--raw", "--prompt", "what is", "--max-new-tokens", "2"]) == 0


def test_flops_are_those_of_the_products():
    config = artefact.hf.read_config(artefact.locate.model("embedded"))
    c, length = config, 10
    layer = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * c.embed_dim * c.mlp_dim
    products = c.num_layers * (layer + 2 * length * c.num_heads * c.head_dim) + c.vocab_size * c.embed_dim
    assert cost.forward_flops(config, "lm", length) == 2 * products
    assert cost.forward_flops(config, "lm", 1) < 2 * cost.parameters(config, "lm")


def test_a_run_that_was_stopped_ends_with_the_same_masks(world, monkeypatch):
    """Stopped in the middle of the schedule, and run again."""
    from tunejax.train import step

    real, calls = step.Step.__call__, []

    def three(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    again = ["train", str(world / "my.yaml"), SPEC, *QUICK, f"output_dir={world / 'again'}", "train.save_steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(step.Step, "__call__", three)
        assert cli.main(again) == 130
    assert cli.main(again) == 0
    one, two = (safetensors.load_file(world / n / "adapter" / "adapter.safetensors") for n in ("run", "again"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes(), name


def test_sizes_of_one_run_while_it_is_taught(world, tmp_path):
    out, model = world / "super", world / "model"
    changes = ["method=[full, {name: supernet, keep: {mlp: 0.5, hidden: 0.5}, sizes: 3}]", f"output_dir={out}",
               f"distill={{teacher: {model}, alpha: 0.5}}"]  # fmt: skip
    assert cli.main(["train", str(world / "my.yaml"), *changes, *QUICK]) == 0
    for size, (mlp, hidden) in enumerate(((24, 16), (18, 12), (12, 8))):
        small = tmp_path / str(size)
        assert cli.main(["shrink", str(out), str(small), f"method.1.size={size}"]) == 0
        c = transformers.AutoModelForCausalLM.from_pretrained(small).config
        assert (c.intermediate_size, c.hidden_size) == (mlp, hidden)


def test_what_cannot_be_shrunk(world, tmp_path, capsys):
    assert cli.main(["shrink", str(world / "run"), str(world / "model")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    lora = ["method={name: lora, rank: 2}", f"output_dir={world / 'lora'}", *QUICK, "train.max_steps=1"]
    assert cli.main(["train", str(world / "my.yaml"), *lora]) == 0
    assert cli.main(["shrink", str(world / "lora"), str(tmp_path / "none")]) == 2
    assert "masks nothing: its method is lora" in capsys.readouterr().err
    assert cli.main(["shrink", str(world / "run"), str(tmp_path / "none"), "--length", "1000"]) == 2
    assert "1 to 64 tokens" in capsys.readouterr().err
    assert cli.main(["export", str(world / "run"), "--output", str(tmp_path / "none")]) == 2
    assert "the run masks layers" in capsys.readouterr().err
    assert cut.head_counts(artefact.open_run(str(world / "run")).parts.model_config, "lm") == (1, 2)
