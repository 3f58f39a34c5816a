"""`tunejax merge`: adapters of finished runs become one, which every other command takes."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.core import combine, paths
from tunejax.recipes import artefact, combined

RUNS = {
    "two": {"name": "lora", "rank": 2, "targets": "attention/{q,v}/kernel"},
    "plus": {"name": "lora_plus", "rank": 2, "alpha": 4.0, "targets": "attention/{v,o}/kernel", "ratio": 4.0},
    "three": [{"name": "lora", "rank": 3, "targets": "attention/q/kernel"}, {"name": "full", "targets": "/norm/scale"}],
    "whole": [
        {"name": "lora", "rank": 2, "targets": "attention/q/kernel"},
        {"name": "full", "targets": "/norm/scale"},
    ],
    "upper": {"name": "full", "targets": "mlp/up/kernel", "layers": "1:"},
    "adapter": {"name": "pfeiffer", "width": 2},
    "union": {"name": "unipelt", "length": 2, "rank": 2, "width": 2, "positions": False, "per": "row"},
    "biases": "bitfit",
    "filled": {"name": "bitfit", "fill_empty": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of short runs on one base, by name."""
    home = tmp_path_factory.mktemp("runs")
    path = worlds.make(home)
    raw = yaml.safe_load(path.read_text())
    del raw["data"]["eval_path"]
    raw["train"] |= {"max_steps": 2, "learning_rate": 0.05}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEJAX_CACHE", str(home / "cache"))
        for seed, (name, method) in enumerate(RUNS.items()):
            raw |= {"output_dir": str(home / name), "method": method, "seed": seed}
            path.write_text(yaml.safe_dump(raw))
            assert cli.main(["train", str(path)]) == 0
    return home


def merged(runs, out, names, *flags):
    """The merge of these runs, opened."""
    assert cli.main(["merge", *(str(runs / n) for n in names), "--output", str(out), *flags]) == 0
    return artefact.open_run(str(out))


def weights(tuned):
    flat = paths.flatten(tuned.parts.method.merge(tuned.base, tuned.train, tuned.state))
    return {p: x for p, x in combined.joined(flat, paths.segments(tuned.base)).items() if x is not None}


def changes(tuned):
    """How far the run moved each weight, by its own merge."""
    before = combined.joined(paths.flatten(tuned.loaded.params), paths.segments(tuned.base))
    return {p: np.asarray(x - before[p]) for p, x in weights(tuned).items()}


def equal(found, expected):
    assert found.keys() == expected.keys()
    assert max(np.abs(x).max() for x in expected.values()) > 1e-2
    for p, x in expected.items():
        np.testing.assert_allclose(found[p], x, atol=1e-6, err_msg=p)


EXACT = [("--how", "cat"), ("--of", "weights", "--how", "linear")]
"""Ways to the exact weighted sum."""


@pytest.mark.parametrize("flags", EXACT)
def test_the_exact_sum_of_what_two_methods_changed(runs, tmp_path, flags):
    found = merged(runs, tmp_path / "out", ["two", "plus"], "--weights", "0.7", "-0.3", *flags)
    one, two = (changes(artefact.open_run(str(runs / n))) for n in ("two", "plus"))
    equal(changes(found), {p: 0.7 * x - 0.3 * two[p] for p, x in one.items()})
    assert found.parts.config.method["name"] == ("full" if "weights" in flags else "lora")


def test_factors_are_combined_as_peft_does(runs, tmp_path):
    found = merged(
        runs, tmp_path / "out", ["two", "plus"], "--how", "ties", "--density", "0.6", "--weights", "1", "0.5"
    )
    two, plus = (artefact.open_run(str(runs / n)) for n in ("two", "plus"))
    both = [combine.Factors(**t.train["layers/0/attention/v/kernel"]) for t in (two, plus)]
    for layer in range(2):
        parts = [jax.tree.map(lambda x, i=layer: x[i], f) for f in both]
        expected = combine.combined_factors(parts, [8.0, 2.0], [1, 0.5], "ties", density=0.6)
        made = jax.tree.map(lambda x, i=layer: x[i], found.train["layers/0/attention/v/kernel"])
        jax.tree.map(np.testing.assert_allclose, made, expected._asdict())
    assert set(found.train) == {f"layers/0/attention/{x}/kernel" for x in "qvo"}


def test_what_comes_out_is_a_run_for_every_other_command(runs, tmp_path, capsys):
    out = tmp_path / "out"
    found = merged(runs, out, ["two", "plus"])
    assert json.loads((out / "summary.json").read_text())["merged"]["weights"] == [0.5, 0.5]
    assert cli.main(["generate", str(out), "--prompt", "what is red cat ?", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), f"data.eval_path={runs / 'eval.jsonl'}"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    for form in ("hf", "peft"):
        assert cli.main(["export", str(out), "--format", form, "--output", str(tmp_path / form)]) == 0
    equal(changes(artefact.open_run(str(tmp_path / "peft"))), changes(found))
    again = merged(runs, tmp_path / "again", [str(tmp_path / "peft"), "two"], "--weights", "1", "-0.5")
    half = {p: x / 2 for p, x in changes(artefact.open_run(str(runs / "plus"))).items()}
    equal(changes(again), half)


def test_a_folder_of_adapterhub_is_a_run_too(runs, tmp_path, capsys):
    out, run = tmp_path / "hub", runs / "adapter"
    assert cli.main(["export", str(run), "--format", "adapterhub", "--output", str(out)]) == 0
    found, expected = artefact.open_run(str(out)), artefact.open_run(str(run))
    jax.tree.map(np.testing.assert_array_equal, found.train, expected.train)
    assert found.parts.config.method[0]["reads"] == "branch"
    data = f"data.eval_path={runs / 'eval.jsonl'}"
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), data]) == 0
    loss = json.loads(capsys.readouterr().out)["loss"]
    assert cli.main(["evaluate", str(out), data, "data.max_length=32"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(loss, abs=1e-5)


def test_a_union_of_adapterhub_is_a_run_too(runs, tmp_path, capsys):
    out, run = tmp_path / "hub", runs / "union"
    assert cli.main(["export", str(run), "--format", "adapterhub", "--output", str(out)]) == 0
    assert [s["name"] for s in artefact.open_run(str(out)).parts.config.method] == ["gated"] * 3
    losses = []
    same = [f"data.eval_path={runs / 'eval.jsonl'}", "data.max_length=32"]  # padding counts in a gate of rows
    for folder in (run, out):
        capsys.readouterr()
        assert cli.main(["evaluate", str(folder), *same]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_chains_combine_part_by_part(runs, tmp_path):
    found = merged(runs, tmp_path / "out", ["whole", "three"], "--weights", "1", "2")
    assert [s["name"] for s in found.parts.config.method] == ["lora", "full"]
    one, two = (changes(artefact.open_run(str(runs / n))) for n in ("whole", "three"))
    equal(changes(found), {p: x + 2 * two[p] for p, x in one.items()})


def test_one_method_may_be_spelled_in_several_ways(runs, tmp_path):
    found = merged(runs, tmp_path / "out", ["biases", "filled"], "--weights", "1", "2")
    one, two = (artefact.open_run(str(runs / n)).train for n in ("biases", "filled"))
    assert max(np.abs(x).max() for x in two.values()) > 1e-2
    for p, x in found.train.items():
        np.testing.assert_allclose(x, one[p] + 2 * two[p], atol=1e-6, err_msg=p)


def test_weights_of_any_methods_and_segments_combine(runs, tmp_path):
    flags = ("--of", "weights", "--how", "ties", "--density", "0.5")
    found = merged(runs, tmp_path / "out", ["upper", "two"], *flags)
    one, two = (changes(artefact.open_run(str(runs / n))) for n in ("upper", "two"))
    assert np.abs(one["layers/0/mlp/up/kernel"][0]).max() == 0
    for p, x in changes(found).items():
        each = [x for x in (one[p], two[p]) if np.abs(x).max() > 0]
        if each and p.startswith("layers/"):
            expected = combine.combine(each, [1.0] * len(each), "ties", density=0.5, each=True)
            np.testing.assert_allclose(x, expected, atol=1e-6)


def test_weights_kept_as_products_of_a_rank(runs, tmp_path):
    found = merged(runs, tmp_path / "out", ["two", "plus"], "--of", "weights", "--rank", "4", "--weights", "1", "1")
    one, two = (changes(artefact.open_run(str(runs / n))) for n in ("two", "plus"))
    assert found.parts.config.method["rank"] == 4
    equal(changes(found), {p: x + two[p] for p, x in one.items()})  # two ranks of 2 fit into 4


def test_weights_of_a_base_in_few_bits_are_not_rounded_to_it(runs, tmp_path):
    bits = ["model.param_dtype=bfloat16", "train.learning_rate=0.003"]
    for name in ("two", "plus"):
        options = [f"method={json.dumps(RUNS[name])}", f"output_dir={tmp_path / name}", *bits]
        assert cli.main(["train", str(runs / "my.yaml"), *options]) == 0
    pair = [str(tmp_path / n) for n in ("two", "plus")]
    products, whole = (merged(runs, tmp_path / how[-1], pair, "--weights", "1", "-2", *how) for how in EXACT)
    assert whole.train.keys() == products.train.keys()
    for p, x in whole.train.items():
        factors = products.train[p]
        change = jnp.matmul(factors["a"], factors["b"], precision="highest")
        assert np.abs(change).max() > 1e-3
        start = paths.get(products.loaded.params, p).astype(jnp.float32)
        np.testing.assert_allclose(x - start, change, atol=1e-6, err_msg=p)


def test_a_base_that_a_method_rewrote_is_counted_once(runs, tmp_path, capsys):
    """Its rounding is in every run, and no run's change."""
    method = [{"name": "quantize"}, {"name": "lora", "rank": 2, "targets": "attention/q/kernel"}]
    for seed in (0, 1):
        options = [f"method={json.dumps(method)}", f"output_dir={tmp_path / str(seed)}", f"seed={seed}"]
        assert cli.main(["train", str(runs / "my.yaml"), *options]) == 0
    pair, out = [str(tmp_path / "0"), str(tmp_path / "1")], str(tmp_path / "out")
    assert cli.main(["merge", *pair, "--of", "weights", "--output", out]) == 2
    assert "quantize+lora rewrote layers/0/attention/k/kernel of the base" in capsys.readouterr().err
    assert cli.main(["merge", *pair, "--output", out]) == 0


@pytest.mark.parametrize("targets", ["attention/q/kernel", "/head/kernel"])
def test_frozen_heads_of_other_seeds_are_refused(runs, tmp_path, capsys, targets):
    """Also below an adapter."""
    for seed in (0, 1):
        method = f"method={{name: lora, rank: 1, targets: {targets}}}"
        options = [*worlds.classified(tmp_path), method, f"output_dir={tmp_path / str(seed)}", f"seed={seed}"]
        assert cli.main(["train", str(runs / "my.yaml"), *options]) == 0
    pair = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert cli.main(["merge", *pair, "--output", str(tmp_path / "out")]) == 2
    assert "the runs have heads of their own (head/kernel, of other seeds)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dropping_at_random_depends_on_the_seed(runs, tmp_path):
    flags = ("--how", "dare_linear", "--seed")
    a, b, c = (
        merged(runs, tmp_path / f"out{i}", ["two", "plus"], *flags, s).train["layers/0/attention/v/kernel"]["b"]
        for i, s in enumerate("112")
    )
    assert jnp.array_equal(a, b)
    assert not jnp.array_equal(a, c)


@pytest.mark.parametrize(
    ("names", "flags", "said"),
    [
        (["two", "three"], [], "no arrays in common"),
        (["two", "adapter"], [], "differ in what they are"),
        (["adapter", "adapter"], ["--of", "weights"], "no plain kernel to merge into"),
        (["two", "plus"], ["--weights", "1"], "1 weights for 2 changes"),
        (["two", "plus"], ["--rank", "3"], "--rank N"),
        (["two", "plus"], ["--density", "0.3"], "dare_linear, dare_ties; not cat"),
        (["two", "plus"], ["--how", "linear", "--density", "0.5"], "dare_linear, dare_ties; not linear"),
        (["two", "nowhere"], [], "no such folder"),
    ],
)
def test_what_does_not_combine_is_told(runs, tmp_path, capsys, names, flags, said):
    assert cli.main(["merge", *(str(runs / n) for n in names), "--output", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_of_other_layers_are_refused_before_anything_is_written(runs, tmp_path, capsys):
    lower, higher = ({**RUNS["two"], "layers": layers} for layers in (":1", "1:"))
    for name, method in (("lower", lower), ("higher", higher)):
        changes = [f"method={json.dumps(method)}", f"output_dir={tmp_path / name}", "train.max_steps=1"]
        assert cli.main(["train", str(runs / "my.yaml"), *changes]) == 0
    pair = [str(tmp_path / "lower"), str(tmp_path / "higher")]
    assert cli.main(["merge", *pair, "--output", str(tmp_path / "both")]) == 2
    assert "the runs train other layers (:1, 1:); --of weights combines them" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()
    assert cli.main(["merge", *pair, "--of", "weights", "--output", str(tmp_path / "both")]) == 0


def test_ranks_that_differ_and_other_bases_are_refused(runs, tmp_path, capsys):
    raw = yaml.safe_load((runs / "my.yaml").read_text())
    raw |= {"method": {**RUNS["two"], "rank": 4}, "output_dir": str(tmp_path / "four"), "seed": 0}
    (tmp_path / "four.yaml").write_text(yaml.safe_dump(raw))
    assert cli.main(["train", str(tmp_path / "four.yaml")]) == 0
    both = ["merge", str(runs / "two"), str(tmp_path / "four"), "--output", str(tmp_path / "out")]
    assert cli.main([*both, "--how", "linear"]) == 2
    assert "found [2, 4]: --how cat stacks them" in capsys.readouterr().err
    worlds.checkpoint(tmp_path / "model", seed=1)
    raw |= {"model": {"path": str(tmp_path / "model")}, "output_dir": str(tmp_path / "other")}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw))
    assert cli.main(["train", str(tmp_path / "other.yaml")]) == 0
    assert cli.main(["merge", str(runs / "two"), str(tmp_path / "other"), "--output", str(tmp_path / "out")]) == 2
    assert "runs combine on one base" in capsys.readouterr().err
