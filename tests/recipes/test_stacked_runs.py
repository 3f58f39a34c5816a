"""Stacks of adapters from a config: finished runs lie frozen below what trains, and are kept with it."""

import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.core import paths, taken
from tunejax.core.bottleneck import Bottleneck
from tunejax.core.model import full_batch
from tunejax.methods import stack
from tunejax.recipes import adapter, artefact

LOWER = {"name": "pfeiffer", "width": 2, "drop_first": 1}
NEW = {"name": "pfeiffer", "width": 3}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(name, method, overrides) -> the exit code of a run; "lower" is one, of the second layer alone."""
    monkeypatch.setenv("TUNEJAX_CACHE", str(tmp_path / "cache"))
    one = worlds.trainer(tmp_path, steps=2)
    assert one("lower", LOWER) == 0
    return one


def on(*folders, **others):
    return {"name": "adapter_stack", "adapters": [str(f) for f in folders], **others}


def bits(tree):
    return {k: np.asarray(x).tobytes() for k, x in adapter.named(tree).items()}


def says(out, capsys):
    capsys.readouterr()
    assert cli.main(["generate", str(out), "--prompt", "what is red cat ?", "--max-new-tokens", "3"]) == 0
    return capsys.readouterr().out


def test_a_run_above_another_keeps_it_as_it_was(run, tmp_path, capsys):
    out, lower = tmp_path / "upper", tmp_path / "lower"
    own, files = adapter.trained(str(lower))[0], (lower / "adapter" / adapter.ARRAYS).read_bytes()
    assert list(own) == ["layers/1/mlp/down/kernel"]
    assert run("upper", [on(lower), NEW]) == 0
    assert (lower / "adapter" / adapter.ARRAYS).read_bytes() == files
    tuned = artefact.open_run(str(out))
    (kept,) = stack.apart(tuned.state["0:adapter_stack"])
    assert bits(kept) == bits(own)
    assert np.abs(tuned.train["1:pfeiffer"]["layers/0/mlp/down/kernel"]["up"]).max() > 1e-3
    before = says(out, capsys)
    shutil.rmtree(lower)
    again = artefact.open_run(str(out))
    assert (bits(again.train), bits(again.state)) == (bits(tuned.train), bits(tuned.state))
    assert says(out, capsys) == before
    assert artefact.prefix(str(out)) == 0
    for form in ("hf", "peft", "adapterhub"):
        assert cli.main(["export", str(out), "--format", form, "--output", str(tmp_path / form)]) == 2
    said = capsys.readouterr().err
    assert "no plain kernel to merge into" in said
    assert "AdapterHub has no form for adapter_stack" in said


def test_it_resumes_to_the_same_bytes(run, tmp_path):
    saving = ["train.save_steps=1"]
    assert run("whole", [on(tmp_path / "lower"), NEW], *saving) == 0
    assert run("halved", [on(tmp_path / "lower"), NEW], *saving) == 0
    for name in ("summary.json", "adapter", "checkpoints/2"):
        path = tmp_path / "halved" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run("halved", [on(tmp_path / "lower"), NEW], *saving) == 0
    one, two = ((tmp_path / n / "adapter" / adapter.ARRAYS).read_bytes() for n in ("whole", "halved"))
    assert one == two


def test_a_task_goes_above_another_language(run, tmp_path):
    """MAD-X: of a run on a stack it is what it trained that is taken, and below it goes another."""
    assert run("other", {**LOWER, "drop_first": 0}, "seed=3") == 0
    assert run("task", [on(tmp_path / "lower"), NEW]) == 0
    assert run("moved", [on(tmp_path / "other", tmp_path / "task"), {"name": "bitfit"}], "train.max_steps=1") == 0
    found = stack.apart(artefact.open_run(str(tmp_path / "moved")).state["0:adapter_stack"])
    task = artefact.open_run(str(tmp_path / "task")).train["1:pfeiffer"]
    other = artefact.open_run(str(tmp_path / "other")).train
    assert [bits(x) for x in found] == [bits(other), bits(taken.joined(task))]
    assert len(task) == 2


def test_finished_runs_are_served_on_top_of_each_other(run, tmp_path, capsys):
    """`merge --how stack`: also with a head that the top run alone has, and in place of what it stood on."""
    language, other, task, out = (tmp_path / n for n in ("language", "other", "task", "out"))
    head = [*worlds.classified(tmp_path), "seed=5"]
    assert run("language", {**NEW, "activation": "gelu"}) == 0
    assert run("other", {**NEW, "width": 2, "activation": "gelu"}, "seed=3") == 0
    full = {"name": "full", "targets": "/head/kernel"}
    assert run("task", [on(language, activation="gelu"), NEW, full], *head) == 0
    assert cli.main(["merge", str(other), str(task), "--how", "stack", "--output", str(out)]) == 0
    top = artefact.open_run(str(task))
    expected = bound([artefact.open_run(str(other)), top], top, [None, "1:pfeiffer"])
    shutil.rmtree(other)
    found = artefact.open_run(str(out))
    assert bits(found.train["1:pfeiffer"]) == bits(top.train["1:pfeiffer"])
    assert bits(found.train["2:full"]) == bits(top.train["2:full"])
    batch = full_batch(jnp.arange(4, 12)[None])
    model = found.parts.model
    ours, theirs = (model.hidden(p, batch)[0] for p in (found.params, expected))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - model.hidden(top.params, batch)[0]).max() > 1e-3
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), f"data.eval_path={tmp_path / 'labelled.jsonl'}"]) == 0
    assert "accuracy" in json.loads(capsys.readouterr().out)
    assert cli.main(["merge", str(language), "--how", "stack", "--output", str(tmp_path / "new")]) == 2
    assert "name two at least" in capsys.readouterr().err
    both = ["merge", str(tmp_path / "lower"), str(language), "--how", "stack", "--output", str(tmp_path / "new")]
    assert cli.main(both) == 2
    assert "cut before [], and above these it would be cut before [1]" in capsys.readouterr().err
    assert cli.main([*both, "--density", "0.5"]) == 2
    assert "--density: --how stack adds nothing up" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def bound(runs, top, keys):
    """The parameters of ``top`` with what these runs trained at the MLP's end, by hand; its whole head too."""
    path = "layers/0/mlp/down/kernel"
    kernel = paths.get(top.loaded.params, path)
    for one, key in zip(runs, keys, strict=True):
        arrays = (one.train if key is None else one.train[key])[path]
        kernel = Bottleneck(kernel, **arrays, activation="gelu" if key is None else "relu")
    return paths.replace(top.loaded.params, {path: kernel, **top.train["2:full"]})


def test_what_does_not_fit_is_told_before_anything_is_written(run, tmp_path, capsys):
    lower = tmp_path / "lower"
    assert run("gelu", {**LOWER, "activation": "gelu"}) == 0
    assert run("above", [on(lower), {**NEW, "activation": "gelu"}]) == 0
    assert run("pair", [NEW, {"name": "bitfit"}]) == 0
    other = f"model.path={worlds.checkpoint(tmp_path / 'base', seed=1)}"
    for method, changes, said in (
        (on(lower, tmp_path / "gelu"), [], "adapters[1] was trained with activation: 'gelu', and here it would have"),
        (on(lower, tmp_path / "above"), [], "adapters[1] was trained with activation: 'gelu', and here it would have"),
        (on(lower, reads="sum"), [], "adapters[0] was trained with reads: 'branch', and here it would have 'sum'"),
        (on(tmp_path / "pair"), [], "adapter 0 is not what a bottleneck adapter trains"),
        (on(tmp_path / "nowhere"), [], "nowhere/adapter is no adapter"),
        (on(lower), [other], f"this run is on {tmp_path / 'base'} (digest "),
    ):
        capsys.readouterr()
        assert run("new", [method, NEW], *changes) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
