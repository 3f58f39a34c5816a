"""Whole commands on a tiny model: a run, its files, going on, and what is made of it."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.config import load
from tunejax.core import digest, errors, paths
from tunejax.interop import hf
from tunejax.recipes import adapter, artefact, rows, settings, train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world in which `tunejax train` has run once."""
    folder = tmp_path_factory.mktemp("world")
    config = worlds.make(folder)
    before = (folder / "model" / "model.safetensors").read_bytes()
    assert cli.main(["train", str(config)]) == 0
    assert (folder / "model" / "model.safetensors").read_bytes() == before
    return folder


def test_the_run_folder_holds_what_the_readme_says(world):
    run = world / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 4
    assert summary["stopped"] == "max_steps"
    assert summary["trained_parameters"] == 2 * 2 * (16 * 2 + 2 * 16)
    assert summary["rows"]["examples"] == 8
    for name in ("loss", "perplexity", "accuracy", "exact_match"):
        assert f"before_{name}" in summary
        assert f"eval_{name}" in summary
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(s) for s in (run / "samples" / "after.jsonl").read_text().splitlines()]
    assert [s["expected"].strip() for s in samples] == ["yes ."] * 4
    assert load.load(run / "config.yaml").train.max_steps == 4
    metrics = [json.loads(s) for s in (run / "metrics.jsonl").read_text().splitlines()]
    assert {m["step"] for m in metrics} == {2, 4}


def test_the_adapter_names_its_base_by_the_digest_of_the_checkpoint(world):
    found = adapter.read(world / "run" / "adapter")
    config = hf.read_config(world / "model")
    params, _ = hf.load(world / "model", config, head="lm", cuts=(1,))
    assert found.base.digest == digest.digest(params)
    assert found.base.name == str(world / "model")


def test_the_same_command_again_changes_nothing(world):
    arrays = (world / "run" / "adapter" / adapter.ARRAYS).read_bytes()
    summary = (world / "run" / "summary.json").read_text()
    assert cli.main(["train", str(world / "my.yaml")]) == 0
    assert (world / "run" / "adapter" / adapter.ARRAYS).read_bytes() == arrays
    assert (world / "run" / "summary.json").read_text() == summary


def test_a_run_stopped_half_way_ends_in_the_same_bytes(world, monkeypatch):
    config, out = str(world / "my.yaml"), world / "halved"
    real, seen = train.loop.fit, []

    def interrupted(step, state, base, loader, options, **kw):
        seen.append(options)
        return real(step, state, base, loader, dataclasses.replace(options, max_steps=2), **kw)

    monkeypatch.setattr(train.loop, "fit", interrupted)
    assert cli.main(["train", config, f"output_dir={out}"]) == 0
    monkeypatch.setattr(train.loop, "fit", real)
    assert json.loads((out / "summary.json").read_text())["step"] == 2
    (out / "summary.json").unlink()
    assert cli.main(["train", config, f"output_dir={out}"]) == 0
    assert seen
    assert json.loads((out / "summary.json").read_text())["step"] == 4
    assert (out / "adapter" / adapter.ARRAYS).read_bytes() == (world / "run" / "adapter" / adapter.ARRAYS).read_bytes()


def test_evaluate_says_what_the_summary_said(world, capsys):
    assert cli.main(["evaluate", str(world / "run"), "--output", str(world / "scores.json")]) == 0
    out = json.loads(capsys.readouterr().out)
    assert json.loads((world / "scores.json").read_text()) == out
    summary = json.loads((world / "run" / "summary.json").read_text())
    for name in ("loss", "accuracy", "exact_match"):
        assert out[name] == pytest.approx(summary[f"eval_{name}"], abs=1e-6)


def test_evaluating_a_config_scores_its_base(world, capsys):
    assert cli.main(["evaluate", str(world / "my.yaml")]) == 0
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(summary["before_loss"], abs=1e-6)


def test_another_base_is_refused_with_both_names(world, tmp_path):
    other = worlds.checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(
        errors.CheckpointError, match=f"trained on {re.escape(str(world / 'model'))}.*{re.escape(str(other))}"
    ):
        artefact.open_run(str(world / "run"), [f"model.path={other}"])


def test_export_is_what_transformers_computes(world):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = world / "merged"
    assert cli.main(["export", str(world / "run"), "--output", str(out)]) == 0
    tuned = artefact.open_run(str(world / "run"))
    tokens = np.arange(4, 14)[None]
    batch = {"tokens": tokens, "positions": np.arange(10)[None], "segment_ids": np.ones((1, 10), np.int32)}
    model, params = tuned.parts.model, tuned.params
    ours = model.logits(model.head(params), model.hidden(params, batch)[0])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    base = safetensors.load_file(world / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(base[name], safetensors.load_file(out / "model.safetensors")[name])
    assert (out / "tokenizer.json").is_file()


def test_generate_streams_the_run_and_the_base(world, capsys):
    for model in ("run", "model"):
        assert cli.main(["generate", str(world / model), "--prompt", "what is red cat ?", "--max-new-tokens", "3"]) == 0
        assert capsys.readouterr().out.endswith("\n")


def test_validate_and_preprocess_run_nothing(world, capsys):
    fresh = f"output_dir={world / 'fresh'}"
    assert cli.main(["validate", str(world / "my.yaml"), fresh]) == 0
    said = capsys.readouterr().out
    assert "lora attention/{q,v}/kernel: 2 leaves, 256 trained parameters" in said
    assert "trainable params: 256" in said
    assert cli.main(["preprocess", str(world / "my.yaml"), fresh, "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert "[[" in said
    assert "ended      8 rows (100.0%) learn to stop" in said
    assert not (world / "fresh").exists()


def test_warm_up_is_judged_by_the_runs_own_steps(world, capsys):
    config = ["validate", str(world / "my.yaml"), f"output_dir={world / 'fresh'}"]
    assert cli.main([*config, "train.max_steps=5000", "train.warmup_steps=2000"]) == 0
    assert cli.main([*config, "train.max_steps=5", "train.warmup_steps=10"]) == 2
    assert "warm-up of 10 steps is longer than the run of 5" in capsys.readouterr().err


def test_held_out_rows_that_are_skipped_are_told(world, capsys):
    held_out = worlds.jsonl(world / "holed.jsonl", [worlds.ROWS[0], {"prompt": "red ?", "completion": ""}])
    changes = [f"data.eval_path={held_out}", "data.on_bad_row=skip", f"output_dir={world / 'holed'}"]
    assert cli.main(["train", str(world / "my.yaml"), *changes]) == 0
    assert "held-out rows skipped: 1 empty" in capsys.readouterr().out
    rows = json.loads((world / "holed" / "summary.json").read_text())["rows"]
    assert (rows["eval_examples"], rows["eval_skipped"]) == (1, {"empty": 1})


def test_a_glob_of_files_is_valid(world, capsys):
    changes = ["validate", str(world / "my.yaml"), f"output_dir={world / 'fresh'}"]
    assert cli.main([*changes, f"data.path={world / 'tr*.jsonl'}"]) == 0
    assert cli.main([*changes, f"data.path={world / 'tr*.csv'}"]) == 2
    assert "data.path.0: no file matches" in capsys.readouterr().err


def test_a_hub_id_is_no_missing_file(world, capsys):
    changes = ["validate", str(world / "my.yaml"), f"output_dir={world / 'fresh'}"]
    assert cli.main([*changes, "data.path=owner/name-2.5"]) == 0
    assert cli.main([*changes, "data.path=./name"]) == 2
    assert "data.path.0: no file name" in capsys.readouterr().err


def test_a_result_outside_the_expected_range_is_told(world, capsys):
    assert cli.main(["train", str(world / "my.yaml"), "expected={eval_loss: [0, 0.001], eval_los: [0, 1]}"]) == 1
    said = capsys.readouterr().err
    assert "the config expects 0 to 0.001" in said
    assert "Did you mean 'eval_loss'" in said


def test_full_tuning_and_a_best_checkpoint(world):
    out = world / "full"
    changes = ["method=full", f"output_dir={out}", "train.eval_steps=1", "train.early_stopping_patience=1",
               "train.learning_rate=1.0", "train.save_total_limit=1", "evaluation.exact_match=false"]  # fmt: skip
    assert cli.main(["train", str(world / "my.yaml"), *changes]) == 0
    summary = json.loads((out / "summary.json").read_text())
    history = [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {h["step"]: h["eval_loss"] for h in history if "eval_loss" in h}
    assert summary["stopped"] == "early"
    assert summary["step"] == summary["best_step"] == min(losses, key=losses.get)
    assert summary["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    assert "eval_exact_match" not in summary


@pytest.mark.parametrize(
    "method",
    [
        {"name": "last_k", "k": 1},
        {"name": "full", "layers": ":1"},
        [{"name": "lora", "rank": 2, "layers": ":1", "targets": "attention/q/kernel"}, {"name": "last_k", "k": 1}],
    ],
    ids=["last layer", "first layer", "beside another"],
)
def test_layers_that_train_whole_leave_nothing_behind(world, tmp_path, method):
    """Of their segment no array stays in the base, by which its layers could be counted."""
    before, _ = hf.load(world / "model", hf.read_config(world / "model"), head="lm")
    changes = [f"method={json.dumps(method)}", f"output_dir={tmp_path / 'run'}", "evaluation.exact_match=false"]
    assert cli.main(["train", str(world / "my.yaml"), *changes]) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "hf")]) == 0
    after, _ = hf.load(tmp_path / "hf", hf.read_config(tmp_path / "hf"), head="lm")
    kernel = "layers/0/mlp/up/kernel"
    moved = np.abs(np.asarray(paths.get(after, kernel)) - np.asarray(paths.get(before, kernel))).max((1, 2)) > 0
    assert moved.tolist() == [False, True] if method != {"name": "full", "layers": ":1"} else [True, False]


def test_classification_keeps_the_head_that_it_drew(world, capsys):
    rows = [{"text": t, "label": n} for t, n in (("red cat", "warm"), ("blue dog", "cold"), ("red dog", "warm"))]
    data = worlds.jsonl(world / "labelled.jsonl", rows)
    out = world / "labels"
    changes = [f"data.path={data}", f"data.eval_path={data}", "objective.name=classification", f"output_dir={out}"]
    assert cli.main(["train", str(world / "my.yaml"), *changes]) == 0
    assert "warning: the checkpoint has no head/kernel: drawn at random" in capsys.readouterr().out
    method = "method=[{name: lora, rank: 2, targets: attention/q/kernel}, {name: full, targets: [/head/kernel]}]"
    assert cli.main(["train", str(world / "my.yaml"), *changes[:-1], f"output_dir={world / 'l2'}", method]) == 0
    assert "drawn at random" not in capsys.readouterr().out
    tuned = artefact.open_run(str(out))
    assert tuned.parts.config.data.labels == ["cold", "warm"]
    head = tuned.params["head"]["kernel"]
    assert head.shape == (16, 2)
    saved = adapter.read(out / "adapter").arrays["fresh|head/kernel"]
    np.testing.assert_array_equal(head, saved)
    assert jax.numpy.isfinite(head).all()
    assert cli.main(["generate", str(out), "--prompt", "red"]) == 2
    assert cli.main(["export", str(out), "--output", str(world / "labels_hf")]) == 0
    said = json.loads((world / "labels_hf" / "config.json").read_text())
    assert said["id2label"] == {"0": "cold", "1": "warm"}
    assert said["label2id"] == {"cold": 0, "warm": 1}


@pytest.mark.parametrize(("multiple", "expected"), [(None, {32}), (6, {12}), (64, {64})])
def test_batches_are_padded_to_the_multiple(world, multiple, expected):
    """Rows have 7 tokens."""
    said = [] if multiple is None else [f"data.pad_to_multiple_of={multiple}"]
    config = load.load(world / "my.yaml", ["data.max_length=64", *said])
    tokenizer = hf.tokenizer(world / "model")
    read = rows.read(config, tokenizer, "decoder")
    made = rows.loaders(config, read, settings.Batches(1, 1, 1), tokenizer)
    assert {batch["tokens"].shape[1] for batch in made.evaluation()} == expected
    assert {made.train.build(i)["tokens"].shape[1] for i in range(8)} == expected
