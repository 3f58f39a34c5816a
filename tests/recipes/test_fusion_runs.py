"""AdapterFusion from a config: the adapters of runs before it are read from their folders and kept with the new one."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.methods import fusion, registry
from tunejax.recipes import adapter, artefact


def test_two_runs_and_what_fuses_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TUNEJAX_CACHE", str(tmp_path / "cache"))
    path = worlds.make(tmp_path)
    raw = yaml.safe_load(path.read_text())
    del raw["data"]["eval_path"]
    raw["train"] |= {"max_steps": 2, "learning_rate": 0.05}

    def run(name, method):
        path.write_text(yaml.safe_dump({**raw, "output_dir": str(tmp_path / name), "method": method}))
        return cli.main(["train", str(path)])

    for width in (2, 3):
        assert run(f"width{width}", {"name": "pfeiffer", "width": width}) == 0
    folders = [str(tmp_path / f"width{w}") for w in (2, 3)]
    assert run("fused", {"name": "adapter_fusion", "adapters": folders}) == 0
    tuned = artefact.open_run(str(tmp_path / "fused"))
    jax.tree.map(np.testing.assert_array_equal, tuned.state, fusion.fuse([adapter.trained(f)[0] for f in folders]))
    (site,) = tuned.train.values()
    assert np.abs(site["value"] - np.eye(16)).max() > 1e-3
    assert run("other", {"name": "adapter_fusion", "adapters": [folders[0], str(tmp_path / "nowhere")]}) == 2
    assert "nowhere/adapter is no adapter" in capsys.readouterr().err
    assert run("gelu", {"name": "pfeiffer", "width": 2, "activation": "gelu"}) == 0
    mixed = {"name": "adapter_fusion", "adapters": [folders[0], str(tmp_path / "gelu")]}
    assert run("other", mixed) == 2
    said = capsys.readouterr().err
    assert "adapters[1] was trained with activation: 'gelu', and here it would have 'relu'; set activation" in said
    assert run("other", {**mixed, "activation": "gelu"}) == 2
    assert "adapters[0] was trained with activation: 'relu', and here it would have 'gelu'" in capsys.readouterr().err
    assert run("sum", {"name": "pfeiffer", "width": 2, "reads": "sum"}) == 0
    assert run("other", {**mixed, "adapters": [folders[0], str(tmp_path / "sum")]}) == 2
    assert "adapters[1] was trained with reads: 'sum', and here it would have 'branch'" in capsys.readouterr().err


@pytest.fixture
def fused(tmp_path, monkeypatch):
    """A world with two runs, "one" and "two"; (name, method, overrides) -> the exit code of a run."""
    monkeypatch.setenv("TUNEJAX_CACHE", str(tmp_path / "cache"))
    run = worlds.trainer(tmp_path, steps=1)
    for seed, name in enumerate(("one", "two")):
        assert run(name, {"name": "pfeiffer", "width": 2 + seed}, f"seed={seed}") == 0
    return run


def test_adapters_of_another_base_are_refused(fused, tmp_path, capsys):
    other = f"model.path={worlds.checkpoint(tmp_path / 'other', seed=1)}"
    assert fused("three", {"name": "pfeiffer", "width": 2}, other) == 0
    one, two, three = ({"name": "adapter_fusion", "adapters": [str(tmp_path / n) for n in names]} for names in (
        ("one", "three"), ("one", "two"), ("three", "three")))  # fmt: skip
    for method, changes, said in (
        (one, [], f"{tmp_path / 'one'} is on {tmp_path / 'model'} (digest "),
        (two, [other], f"this run is on {tmp_path / 'other'} (digest "),
        (three, [], f"and {tmp_path / 'three'} on {tmp_path / 'other'} (digest "),
    ):
        capsys.readouterr()
        assert fused("fused", method, *changes) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "fused").exists()
    assert fused("fused", three, other) == 0


def test_adapters_of_another_head_have_no_digest_to_compare(fused, tmp_path):
    method = {"name": "adapter_fusion", "adapters": [str(tmp_path / n) for n in ("one", "two")]}
    assert fused("fused", method, *worlds.classified(tmp_path)) == 0


@pytest.mark.parametrize("chained", [False, True])
def test_a_fused_run_holds_what_it_fused(fused, tmp_path, capsys, chained):
    """The runs that it names may have moved."""
    method = {"name": "adapter_fusion", "adapters": [str(tmp_path / n) for n in ("one", "two")]}
    chain = [{"name": "lora", "rank": 1, "targets": "attention/q/kernel"}, method]
    assert fused("fused", chain if chained else method) == 0
    out = str(tmp_path / "fused")
    before = artefact.open_run(out)
    for name in ("one", "two"):
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
    after = artefact.open_run(out)
    jax.tree.map(np.testing.assert_array_equal, (after.train, after.state), (before.train, before.state))
    assert artefact.prefix(out) == 0
    assert cli.main(["generate", out, "--prompt", "what is red cat ?", "--max-new-tokens", "1"]) == 0
    merged = str(tmp_path / "merged")
    assert cli.main(["merge", out, "--weights", "0.5", "--output", merged]) == 0
    halved = jax.tree.leaves(artefact.open_run(merged).state)
    jax.tree.map(np.testing.assert_array_equal, halved, jax.tree.leaves(before.state))
    capsys.readouterr()
    assert fused("again", method) == 2
    assert "one/adapter is no adapter" in capsys.readouterr().err


def test_a_method_of_a_users_file_is_not_judged():
    """Its file may have moved, and its arguments may mean anything."""
    arrays = {"down": np.zeros((4, 2)), "down_bias": np.zeros(2), "up": np.zeros((2, 4)), "up_bias": np.zeros(4)}
    described = {"name": "gone.py:adapter", "activation": "gelu"}
    spec = {"name": "adapter_fusion", "adapters": ["one", "two"]}
    method = registry.build(spec, load=lambda folder: ({"layers/0/mlp/down/kernel": arrays}, described))
    assert method.name == "adapter_fusion"
