"""`tunejax unmerge`: a merged folder and a run give the base's folder again."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from safetensors import numpy as safetensors

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.interop import hf

TWO = "attention/{q,v}/kernel"
METHODS = {
    "lora": {"name": "lora", "rank": 2, "targets": TWO},
    "dora": {"name": "dora", "rank": 2, "targets": TWO},
    "ia3": {"name": "ia3"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders: a run and its merge for each method on a Llama, "<name>" and "<name>_merged"; BERT's behind "bert_"."""
    home = tmp_path_factory.mktemp("world")
    worlds.make(home)
    bert = home / "bert"
    bert.mkdir()
    config = dataclasses.replace(tiny.BERT, vocab_size=worlds.tokenizer_files(bert), num_labels=2)
    hf.save(bert, tiny.params(config, "classification"), config, head="classification")
    (home / "more").mkdir()
    labelled = [*worlds.classified(home / "more"), f"model.path={bert}", "data.labels=[LABEL_0,LABEL_1]"]
    rows = [{"text": f"the {c} cat", "label": f"LABEL_{i}"} for i, c in enumerate(("red", "blue"))] * 4
    worlds.jsonl(home / "more" / "labelled.jsonl", rows)
    always = ["train.max_steps=2", "train.learning_rate=0.05", "data.eval_path=null", "generation.num_samples=0"]
    for name, method in METHODS.items():
        for out, changes in ((name, []), (f"bert_{name}", labelled)):
            options = [f"output_dir={home / out}", f"method={json.dumps(method)}", *always, *changes]
            assert cli.main(["train", str(home / "my.yaml"), *options]) == 0
            assert cli.main(["export", str(home / out), "--output", str(home / f"{out}_merged")]) == 0
    return home


def weights(folder):
    return safetensors.load_file(folder / "model.safetensors")


def test_the_folder_comes_back(world, tmp_path, capsys):
    for base, prefix in (("model", ""), ("bert", "bert_")):
        theirs = weights(world / base)
        for name in METHODS:
            merged, out = world / f"{prefix}{name}_merged", tmp_path / f"{prefix}{name}"
            capsys.readouterr()
            assert cli.main(["unmerge", str(merged), str(world / f"{prefix}{name}"), "--output", str(out)]) == 0
            said = capsys.readouterr().out
            assert f"{out}: {merged} without {name}, at most " in said
            assert f"from {world / base} (digest " in said
            ours, changed = weights(out), weights(merged)
            assert ours.keys() == theirs.keys()
            assert max(np.abs(changed[k] - x).max() for k, x in theirs.items()) > 1e-3
            for k, x in theirs.items():
                np.testing.assert_allclose(ours[k], x, atol=1e-6, rtol=0, err_msg=k)
            assert json.loads((out / "config.json").read_text()) == json.loads(
                (world / base / "config.json").read_text()
            )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert model.config.vocab_size == len(transformers.AutoTokenizer.from_pretrained(tmp_path / "lora"))


def test_a_merge_kept_in_few_bits_comes_back_to_their_rounding(world, tmp_path):
    small, out = tmp_path / "small", tmp_path / "out"
    assert cli.main(["export", str(world / "lora"), "--output", str(small), "--dtype", "bfloat16"]) == 0
    assert cli.main(["unmerge", str(small), str(world / "lora"), "--output", str(out)]) == 0
    for k, x in weights(world / "model").items():
        assert weights(out)[k].dtype == x.dtype
        np.testing.assert_allclose(weights(out)[k], x, atol=2 * jnp.finfo(jnp.bfloat16).eps * np.abs(x).max())


def test_what_is_no_merge_of_the_run_is_told(world, tmp_path, capsys):
    out = tmp_path / "out"
    for merged, run, said in (
        ("dora_merged", "lora", "which is more than rounding: it is no merge of that run"),
        ("model", "lora", "which is more than rounding"),
        ("bert_lora_merged", "lora", "is a bert, and"),
        ("nowhere", "lora", "nowhere"),
        ("lora_merged", "nowhere", "no such folder"),
    ):
        capsys.readouterr()
        assert cli.main(["unmerge", str(world / merged), str(world / run), "--output", str(out)]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()
    other = worlds.checkpoint(tmp_path / "other", mlp_dim=20)
    assert cli.main(["unmerge", str(other), str(world / "lora"), "--output", str(out)]) == 2
    assert "layers/0/mlp/down/kernel: of shape (2, 20, 16), expected (2, 24, 16)" in capsys.readouterr().err


def test_one_of_two_changes_is_taken_away(world, tmp_path):
    """What else is in the folder stays."""
    both = ["merge", str(world / "lora"), str(world / "dora"), "--of", "weights", "--weights", "1", "1"]
    assert cli.main([*both, "--output", str(tmp_path / "both")]) == 0
    assert cli.main(["export", str(tmp_path / "both"), "--output", str(tmp_path / "merged")]) == 0
    back = ["unmerge", str(tmp_path / "merged"), str(world / "lora"), "--output", str(tmp_path / "out")]
    assert cli.main(back) == 2
    assert cli.main([*back, "--rest"]) == 0
    found, expected = weights(tmp_path / "out"), weights(world / "dora_merged")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)
