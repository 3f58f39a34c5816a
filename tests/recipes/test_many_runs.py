"""A section `many:`: each member ends as the run folder that its own run would have left."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.recipes import artefact, folder

MEMBERS = [
    {"seed": 3, "method.rank": 3, "method.alpha": 5.0},
    {"learning_rate": 0.1},
    {"seed": 4, "train.learning_rate": 0.01, "method.rank": 4},
]


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEJAX_CACHE", str(tmp_path / "cache"))
    path = worlds.make(tmp_path)
    raw = yaml.safe_load(path.read_text())
    raw["train"] |= {"learning_rate": 0.05, "train_batch_size": 4, "eval_steps": 2}
    raw["mesh"] = {"data": 2, "tensor": 4}
    path.write_text(yaml.safe_dump({**raw, "many": MEMBERS}))
    return path


def test_each_member_is_its_own_run(path, tmp_path, capsys):
    """Also where all learn from a teacher."""
    raw = yaml.safe_load(path.read_text())
    raw["distill"] = {"teacher": str(worlds.checkpoint(tmp_path / "teacher", seed=5)), "alpha": 0.3}
    path.write_text(yaml.safe_dump(raw))
    assert cli.main(["train", str(path)]) == 0
    whole = json.loads((tmp_path / "run/summary.json").read_text())
    assert [m["seed"] for m in whole["members"]] == [3, 0, 4]
    for i, entry in enumerate(MEMBERS):
        own = [f"{'train.' if k == 'learning_rate' else ''}{k}={v}" for k, v in entry.items()]
        assert cli.main(["train", str(path), "many=[]", f"output_dir={tmp_path / f'own{i}'}", *own]) == 0
        one, alone = tmp_path / f"run/members/{i}", tmp_path / f"own{i}"
        found, expected = artefact.open_run(str(one)), artefact.open_run(str(alone))
        close(found.train, expected.train)
        one_summary, summary = (json.loads((f / "summary.json").read_text()) for f in (one, alone))
        assert one_summary.keys() == summary.keys()
        assert one_summary["trained_parameters"] == summary["trained_parameters"]
        for key in ("before_loss", "eval_loss"):
            assert abs(one_summary[key] - summary[key]) < 1e-5
        for row, wanted in zip(*(folder.read_rows(f / "metrics.jsonl") for f in (one, alone)), strict=True):
            shared = {"step", "loss", "hard", "soft", "learning_rate", "eval_loss"} & wanted.keys()
            assert "loss" not in wanted or {"hard", "soft"} <= shared
            np.testing.assert_allclose([row[k] for k in shared], [wanted[k] for k in shared], rtol=1e-5)
        assert (one / "plots/loss.png").is_file()
    assert cli.main(["generate", str(tmp_path / "run/members/1"), "--prompt", "what is", "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["train", str(path)]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_killed_run_goes_on(path, tmp_path):
    half = ["train", str(path), "mesh={data: 8}", "train.train_batch_size=8"]
    assert cli.main([*half, f"output_dir={tmp_path / 'once'}"]) == 0
    assert cli.main([*half, "train.save_steps=1"]) == 0
    for done in (tmp_path / "run").glob("members/*/summary.json"):
        done.unlink()
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    assert cli.main([*half, "train.save_steps=1"]) == 0
    for i in range(3):
        a, b = (artefact.open_run(str(tmp_path / f"{run}/members/{i}")) for run in ("run", "once"))
        jax.tree.map(np.testing.assert_array_equal, a.train, b.train)


def test_a_head_that_the_checkpoint_lacks_is_each_members_own(path, tmp_path, capsys):
    rows = [{"text": f"the {c} cat", "label": c} for c in ("red", "blue", "big", "two")] * 2
    data = ["objective.name=classification", f"data.path={worlds.jsonl(tmp_path / 'labelled.jsonl', rows)}",
            "data.eval_path=null", "train.eval_steps=null", "mesh={data: 8}", "train.train_batch_size=8"]  # fmt: skip
    lora = "{name: lora, rank: 2, targets: attention/q/kernel}"
    both = [*data, f"method=[{lora}, {{name: full, targets: /head/kernel}}]"]
    assert cli.main(["train", str(path), *both, "many=[{seed: 1}, {seed: 2}]"]) == 0
    for i in range(2):
        own = ["many=[]", f"seed={i + 1}", f"output_dir={tmp_path / f'own{i}'}"]
        assert cli.main(["train", str(path), *both, *own]) == 0
        found, alone = (artefact.open_run(str(f)) for f in (tmp_path / f"run/members/{i}", tmp_path / f"own{i}"))
        close(found.train, alone.train)
    capsys.readouterr()
    frozen = [*data, f"method={lora}", f"output_dir={tmp_path / 'frozen'}", "many=[{seed: 1}, {seed: 2}]"]
    assert cli.main(["train", str(path), *frozen]) == 2
    assert "begins differently for each member and is frozen: let it train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method",
    [
        "{name: fish, mask_steps: 1, density: 0.1}",
        "{name: lt_sft, mask_steps: 2, density: 0.1}",
        "[{name: full}, {name: prune, density: 0.5, steps: 3, every: 1}]",
    ],
)
def test_a_method_that_counts_its_updates(path, tmp_path, method):
    """A scalar in its state has no axis that could be padded."""
    options = [f"method={method}", "data.eval_path=null", "train.eval_steps=null", "mesh={data: 8}"]
    options += ["train.train_batch_size=8", "train.learning_rate=0.01"]
    assert cli.main(["train", str(path), *options, "many=[{seed: 1}, {seed: 2}]"]) == 0
    for i in range(2):
        own = ["many=[]", f"seed={i + 1}", f"output_dir={tmp_path / f'own{i}'}"]
        assert cli.main(["train", str(path), *options, *own]) == 0
        found, alone = (artefact.open_run(str(f)) for f in (tmp_path / f"run/members/{i}", tmp_path / f"own{i}"))
        close((found.train, found.state), (alone.train, alone.state))


def test_a_preset_before_what_differs_is_told(path, tmp_path, capsys):
    """It is several methods, so that what differs would be counted to another."""
    chain = "method=[{name: mam, length: 2, width: 4}, {name: lora, rank: 2, targets: attention/q/kernel}]"
    assert cli.main(["train", str(path), chain, "many=[{seed: 0}, {seed: 0, method.1.alpha: 64.0}]"]) == 2
    assert "a preset in a list of methods is several of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{data.max_length: 8}", "data.max_length is shared by all members"),
        ("{method.targets: mlp/up/kernel}", "lora with other targets; members of one program may differ in rank"),
        ("{method: bitfit}", "lora and bitfit"),
        ("{method.learning_rate_scale: 0.5}", "lora with other learning_rate_scale"),
        ("{sed: 3}", "many.1: unknown key 'sed'"),
        ("{output_dir: elsewhere}", "many.1: output_dir is not a member's own"),
    ],
)
def test_what_does_not_fit_is_told(path, tmp_path, capsys, entry, said):
    assert cli.main(["train", str(path), f"many=[{{seed: 1}}, {entry}]"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
