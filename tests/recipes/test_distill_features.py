"""Features of a teacher by whole commands: any method learns them, and what they need stays out of its adapter."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli

QUICK = ("data.eval_path=null", "train.max_steps=8", "train.logging_steps=1", "train.learning_rate=0.01")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a wider, deeper checkpoint, the teacher."""
    folder = tmp_path_factory.mktemp("world")
    worlds.make(folder)
    worlds.checkpoint(folder / "big", 3, embed_dim=24, num_layers=4, num_heads=4)
    return folder


def arrays(world, name):
    return safetensors.load_file(world / name / "adapter" / "adapter.safetensors")


def section(world, **options):
    return f"distill={json.dumps({'teacher': str(world / 'big'), **options})}"


def test_hidden_states_of_a_wider_teacher_and_what_is_saved(world, capsys):
    """Trained, evaluated, kept at its best and opened again: as a LoRA that knows nothing of the kernels beside it."""
    file = worlds.jsonl(world / "held.jsonl", worlds.ROWS[:2])
    hidden = {"weight": 0.5, "layers": [[0, 1], [-1, -1]], "embeddings": True, "metric": "normalized_mse"}
    code, rows = worlds.tune(
        world, "hidden", section(world, alpha=0.25, hidden=hidden), *QUICK, f"data.eval_path={file}",
        "train.eval_steps=4", "train.load_best_model_at_end=true",
    )  # fmt: skip
    assert code == 0
    for row in rows:
        want = 0.25 * row["hard"] + 0.75 * row["soft"] + 0.5 * row["hidden"]
        np.testing.assert_allclose(row["loss"], want, rtol=1e-5)
    assert rows[-1]["hidden"] < 0.9 * rows[0]["hidden"]
    assert not [name for name in arrays(world, "hidden") if "lora" not in name and "attention" not in name]
    summary = json.loads((world / "hidden" / "summary.json").read_text())
    capsys.readouterr()
    assert cli.main(["evaluate", str(world / "hidden")]) == 0
    again = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(again["loss"], summary["eval_loss"], rtol=1e-6)
    assert worlds.tune(world, "alone", *QUICK)[0] == 0
    assert {k: x.shape for k, x in arrays(world, "alone").items()} == {
        k: x.shape for k, x in arrays(world, "hidden").items()
    }


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("full", ["method=full", "model.layers=[1]"]),
        ("prompt", ["method={name: prompt_tuning, length: 2}"]),
        ("chained", ["method=[bitfit, {name: lora, rank: 2}, norm_tuning]", "data.packing=true", "data.max_length=32"]),
    ],
)
def test_relations_and_features_alone(world, name, changes):
    options = {"alpha": 0.0, "logits": 0.0, "relations": {"heads": 4, "weight": 2.0}, "hidden": {"layers": "last"}}
    code, rows = worlds.tune(world, name, section(world, **options), *QUICK, "train.max_steps=5", *changes)
    assert code == 0
    np.testing.assert_allclose(rows[0]["loss"], 2 * rows[0]["relations"] + rows[0]["hidden"], rtol=1e-5)
    assert "soft" not in rows[0]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not [k for k in arrays(world, name) if "projections" in k]


def test_the_base_teaches_features_too(world):
    options = {"teacher": "base", "alpha": 0.5, "relations": {}, "hidden": {"metric": "cosine"}}
    code, rows = worlds.tune(world, "itself", section(world, **options), *QUICK, "train.max_steps=3")
    assert code == 0
    assert rows[0]["relations"] < 1e-5
    assert rows[0]["hidden"] < 1e-5
    assert rows[-1]["relations"] > rows[0]["relations"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden": {"layers": [[2, 0]]}}, "layer 2 of the student, which has 2"),
        ({"hidden": {"project": False}}, "a width of 16 with the teacher's 24"),
        ({"hidden": {"metric": "cosinus"}}, "distill.hidden.metric"),
        ({"hidden": {"layer": "last"}}, "distill.hidden.layer"),
        ({"relations": {"teacher_layer": 9}}, "layer 9 of the teacher, which has 4"),
        ({"relations": {}}, "compares 2 heads (query) with the teacher's 4"),
        ({"relations": {}, "cache": "x"}, "relations needs the teacher itself"),
        ({"alpha": 0.0, "logits": 0.0}, "nothing is learned"),
    ],
)
def test_what_does_not_fit_is_told(world, capsys, options, says):
    assert worlds.tune(world, "none", section(world, **options))[0] == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
