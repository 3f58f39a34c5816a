"""Distillation by whole commands: from a run into a shallower student, from the base into its adapter."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.core import errors, paths
from tunejax.interop import hf
from tunejax.models import build
from tunejax.models.config import ModelConfig
from tunejax.recipes import artefact, comparable


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a finished run, the teacher."""
    folder = tmp_path_factory.mktemp("world")
    longer = ["method=full", "train.max_steps=30", "train.learning_rate=0.01", "generation.num_samples=0"]
    assert cli.main(["train", str(worlds.make(folder)), *longer]) == 0
    return folder


student = worlds.tune


def test_a_shallower_student_learns_from_a_run_and_is_exported(world, tmp_path):
    code, rows = student(
        world, "small", f"distill={{teacher: {world / 'run'}, alpha: 0.25}}", "model.layers=[1]", "method=full",
        "train.max_steps=12", "train.learning_rate=0.01",
    )  # fmt: skip
    assert code == 0
    for row in rows:
        np.testing.assert_allclose(row["loss"], 0.25 * row["hard"] + 0.75 * row["soft"], rtol=1e-5)
    assert rows[-1]["soft"] < rows[0]["soft"]
    assert "eval_soft" not in json.loads((world / "small" / "summary.json").read_text())
    assert cli.main(["export", str(world / "small"), "--output", str(tmp_path / "hf")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.num_hidden_layers == 1


def test_the_layers_that_are_kept_are_the_checkpoints(world):
    whole = artefact.plain(str(world / "model")).params
    student(world, "second", "model.layers=[1]", "train.max_steps=1")
    kept = paths.flatten(artefact.open_run(str(world / "second")).base)
    for path, leaf in paths.flatten(whole).items():
        if leaf is not None:
            np.testing.assert_array_equal(leaf[1:] if path.startswith("layers/") else leaf, kept[path])


def test_the_base_teaches_its_own_soft_prompt(world):
    code, rows = student(
        world, "itself", "distill={teacher: base, alpha: 0}", "method={name: prompt_tuning, length: 2}",
        "train.max_steps=10", "train.learning_rate=0.3",
    )  # fmt: skip
    assert code == 0
    assert rows[-1]["soft"] < rows[0]["soft"]


def test_the_base_by_name_does_not_see_the_prompt_either(world):
    losses = []
    for name, teacher in (("a_base", "base"), ("a_named", world / "model")):
        code, rows = student(
            world, name, f"distill={{teacher: {teacher}, alpha: 0}}", "method={name: prompt_tuning, length: 2}",
            "train.max_steps=2", "train.logging_steps=1",
        )  # fmt: skip
        assert code == 0
        losses.append([row["soft"] for row in rows])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_student_from_random_weights_differs_by_its_seed(world):
    for name, seed in (("a", 0), ("b", 1)):
        code, _ = student(world, name, "model.random_init=true", f"seed={seed}", "train.max_steps=1")
        assert code == 0
    a, b = (paths.flatten(artefact.open_run(str(world / name)).base) for name in "ab")
    assert not np.array_equal(a["embed/table"], b["embed/table"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["distill={teacher: nowhere/at/all}"], "no checkpoint folder at nowhere/at/all"),
        (["distill={teacher: base}", "method=full"], "full trains"),
        (["distill={teacher: base, temperature: 0}"], "distill.temperature"),
        (["distill.teachr=base"], "Did you mean 'distill.teacher'"),
        (["model.layers=[0, 2]"], "model.layers names layer 2"),
        (["model.layers=[1, 0]"], "ascend"),
    ],
)
def test_what_does_not_fit_is_told(world, capsys, changes, says):
    code, _ = student(world, "none", *changes)
    assert code == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def test_another_vocabulary_is_refused(world, tmp_path, capsys):
    config = json.loads((world / "model" / "config.json").read_text())
    assert config["vocab_size"] == 20
    folder = worlds.checkpoint(tmp_path / "other")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": 21}))
    assert student(world, "none", f"distill={{teacher: {folder}}}")[0] == 2
    assert "expected (21, 16)" in capsys.readouterr().err


LABELS = ("objective.name=classification", "method=bitfit", "train.max_steps=1", "data.eval_path=null")


@pytest.fixture(scope="module")
def labelled(world):
    """Labelled rows, and a checkpoint that tells their two classes apart, by these names in config.json."""
    worlds.jsonl(
        world / "labelled.jsonl", [{"text": r["prompt"], "label": "ny"[i % 2]} for i, r in enumerate(worlds.ROWS)]
    )
    config = ModelConfig(family="llama", vocab_size=20, num_labels=2, **worlds.SIZES)
    params = build.build(config, head="classification").init(jax.random.key(3))
    hf.save(world / "judge", params, config, head="classification", tokenizer_from=world / "model")
    raw = json.loads((world / "judge" / "config.json").read_text())
    (world / "judge" / "config.json").write_text(json.dumps({**raw, "id2label": {"0": "N", "1": "Y"}}))
    return world


def learn_labels(world, name, *changes):
    return student(world, name, f"data.path={world / 'labelled.jsonl'}", *LABELS, *changes)[0]


@pytest.mark.parametrize("kind", ["checkpoint", "run"])
def test_labels_in_another_order_are_refused(labelled, capsys, kind):
    """A teacher's first class would teach the student's first, whatever they are called."""
    teacher = labelled / "judge"
    if kind == "run":
        teacher = labelled / "tuned_judge"
        assert learn_labels(labelled, "tuned_judge", "data.labels=[n, y]") == 0
    section = f"distill={{teacher: {teacher}, alpha: 0}}"
    assert learn_labels(labelled, f"same_{kind}", section) == 0  # their names, sorted
    assert learn_labels(labelled, "none", section, "data.labels=[y, n]") == 2
    err = capsys.readouterr().err
    names = "[N, Y]" if kind == "checkpoint" else "[n, y]"
    assert f"{teacher} has the labels {names}, and the student [y, n]" in err
    assert "set data.labels=[n, y]" in err
    assert not (labelled / "none").exists()


def test_labels_are_compared_where_they_have_names_in_common():
    for ours, theirs in ((["0", "1"], ["neg", "pos"]), (["a", "b"], []), (["neg", "pos"], ["NEG", "POS"])):
        comparable.check_labels("t", ours, theirs)
    for ours, theirs in ((["1", "0"], ["0", "1"]), (["a", "b", "c"], ["a", "b", "d"])):
        with pytest.raises(errors.ConfigError, match="expected the same ones in the same order"):
            comparable.check_labels("t", ours, theirs)


def test_an_encoder_does_not_teach_a_decoder(labelled, capsys):
    """They have the label at other ends of a row, and a token of an encoder's sees what comes after it."""
    sizes = {"kind": "encoder", "norm": "layer", "position": "learned", "gated_mlp": False, "type_vocab_size": 2}
    more = {"activation": "gelu", "attention_bias": (True,) * 4, "mlp_bias": True, "tie_embeddings": True}
    config = ModelConfig(family="bert", vocab_size=20, num_labels=2, **worlds.SIZES, **sizes, **more)
    params = build.build(config, head="classification").init(jax.random.key(3))
    folder = labelled / "encoder"
    hf.save(folder, params, config, head="classification", tokenizer_from=labelled / "model")
    assert learn_labels(labelled, "none", f"distill={{teacher: {folder}}}") == 2
    assert f"{folder} is an encoder, and the student a decoder" in capsys.readouterr().err
    assert not (labelled / "none").exists()


@pytest.fixture(scope="module")
def prefixed(world):
    """A run whose method takes 8 of the 64 positions before its rows."""
    changes = ["method={name: prefix_tuning, length: 8}", "train.max_steps=1", "data.eval_path=null"]
    assert student(world, "prefixed", *changes)[0] == 0
    return world / "prefixed"


def test_a_prefix_of_the_teachers_leaves_fewer_positions(world, prefixed, capsys):
    section = f"distill={{teacher: {prefixed}}}"
    assert student(world, "none", section, "data.max_length=57")[0] == 2
    err = capsys.readouterr().err
    assert "has 64 positions, of which prefix_tuning takes 8, and data.max_length is 57" in err
    assert not (world / "none").exists()
    assert student(world, "fits", section, "data.max_length=56", "train.max_steps=1", "data.eval_path=null")[0] == 0


def test_the_positions_that_a_prefix_takes(world, prefixed, tmp_path):
    assert artefact.prefix(str(prefixed)) == 8
    assert artefact.prefix(str(world / "model")) == 0
    assert cli.main(["export", str(prefixed), "--format", "peft", "--output", str(tmp_path / "peft")]) == 0
    assert artefact.prefix(str(tmp_path / "peft")) == 8
