"""A teacher of another tokenizer by whole commands: the student learns by ULD, and nothing else lets it."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import toys
import worlds

from tunejax.data import align
from tunejax.interop import hf
from tunejax.models import build
from tunejax.models.config import ModelConfig

QUICK = ("data.eval_path=null", "train.learning_rate=0.01", "train.logging_steps=1", "train.max_steps=6")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with another checkpoint, whose tokens are characters."""
    folder = tmp_path_factory.mktemp("world")
    worlds.make(folder)
    (folder / "chars").mkdir()
    toys.characters().save_pretrained(folder / "chars")
    config = ModelConfig(family="llama", vocab_size=132, **worlds.SIZES)
    params = build.build(config, head="lm").init(jax.random.key(5))
    hf.save(folder / "chars", jax.tree.map(lambda x: 4 * x, params), config, head="lm")
    return folder


def section(world, **options):
    named = {"teacher": str(world / "chars"), "divergence": "uld", "temperature": 1.0, **options}
    return f"distill={json.dumps(named)}"


@pytest.mark.parametrize("method", ["full", "{name: prompt_tuning, length: 2}"], ids=["full", "prompt"])
def test_it_learns(world, method):
    code, rows = worlds.tune(world, method[1:5], section(world, alpha=0.25), *QUICK, f"method={method}")
    assert code == 0
    for row in rows:
        np.testing.assert_allclose(row["loss"], 0.25 * row["hard"] + 0.75 * row["soft"], rtol=1e-5)
    assert 0 < rows[-1]["soft"] < rows[0]["soft"]


@pytest.mark.parametrize(
    ("options", "changes", "says"),
    [
        ({"divergence": "forward_kl"}, [], "set distill.divergence: uld"),
        ({"relations": {}}, [], "distill.relations does not go with a teacher of another tokenizer"),
        ({}, ["data.packing=true"], "data.packing does not go with a teacher of another tokenizer"),
        ({"cache": "x"}, [], "a cache has their likeliest tokens only"),
        ({}, ["objective.name=masked_lm"], "uld goes with objective.name: causal_lm"),
    ],
)
def test_what_does_not_fit_is_told(world, capsys, options, changes, says):
    assert worlds.tune(world, "none", section(world, **options), *QUICK, *changes)[0] == 2
    assert says in capsys.readouterr().err


def test_with_the_same_tokenizer_positions_meet_as_they_are(world):
    code, rows = worlds.tune(
        world, "same", section(world, teacher=str(world / "model"), alpha=0), *QUICK, "data.packing=true",
        "data.max_length=32", "method=bitfit",
    )  # fmt: skip
    assert code == 0
    np.testing.assert_allclose(rows[0]["soft"], 0, atol=1e-6)


def test_a_tokenizer_that_the_student_names_is_not_the_teachers(world):
    """The student's has more tokens than the teacher's model, which is opened with its own."""
    named = [f"model.{key}={world / 'chars'}" for key in ("path", "tokenizer")]
    teacher = section(world, teacher=str(world / "model"))
    code, rows = worlds.tune(world, "named", teacher, *QUICK, *named, "train.max_steps=1", "data.max_length=48")
    assert code == 0
    assert rows[0]["soft"] > 0


def test_a_teacher_with_a_prefix_reads_rows_that_fit_behind_it(world, monkeypatch):
    """44 of its 64 positions are the prefix's, and the longest row has 24 characters."""
    changes = ["data.max_length=20", "data.truncation=end", "train.max_steps=1", f"model.path={world / 'chars'}"]
    method = "method={name: prefix_tuning, length: 44}"
    assert worlds.tune(world, "behind", *QUICK, *changes, method)[0] == 0
    longest, made = [], align.Aligned

    def spied(ours, theirs, *tokenizers):
        longest.append(int(theirs.lengths.max()))
        return made(ours, theirs, *tokenizers)

    monkeypatch.setattr(align, "Aligned", spied)
    teacher = section(world, teacher=str(world / "behind"))
    code, rows = worlds.tune(world, "read_behind", teacher, *QUICK, "train.max_steps=1")
    assert code == 0
    assert longest == [19]  # of 20 ids the last is only ever a target
    assert rows[0]["soft"] > 0
