"""Scores of held-out rows that depend on the rows alone: not on batches, and a perplexity not on the loss's options."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import tiny
import toys
import worlds

from tunejax import cli
from tunejax.config import load
from tunejax.data import completions
from tunejax.interop import hf
from tunejax.models import build
from tunejax.recipes import artefact, assemble, samples


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A config of a BERT and held-out texts of many lengths."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "model").mkdir()
    hf.save(folder / "model", build.build(tiny.BERT, head="mlm").init(jax.random.key(0)), tiny.BERT, head="mlm")
    toys.encoder().save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 10, rng.integers(2, 28))) for _ in range(40)]
    rows = worlds.jsonl(folder / "rows.jsonl", [{"text": t} for t in texts])
    (folder / "my.yaml").write_text(json.dumps({
        "output_dir": str(folder / "run"), "model": {"path": str(folder / "model")}, "method": "full",
        "data": {"path": str(rows), "eval_path": str(rows), "max_length": 32},
        "objective": {"name": "masked_lm"}, "train": {"report_to": "none", "progress": False},
    }))  # fmt: skip
    return folder / "my.yaml"


def evaluated(config, capsys, *changes):
    """What `tunejax evaluate` says."""
    capsys.readouterr()
    assert cli.main(["evaluate", str(config), *changes]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_masked_does_not_depend_on_the_batches(masked, capsys):
    want = evaluated(masked, capsys, "train.eval_batch_size=8")
    for changes in (["train.eval_batch_size=16"], ["train.eval_batch_size=64"],
                    ["train.eval_batch_size=8", "data.pad_to_multiple_of=3"],
                    ["train.eval_batch_size=8", "data.packing=true"],
                    ["train.eval_batch_size=8", "mesh.data=2", "mesh.tensor=4"]):  # fmt: skip
        found = evaluated(masked, capsys, *changes)
        for name in ("loss", "accuracy", "perplexity"):
            assert found[name] == pytest.approx(want[name], rel=1e-5), (changes, name)


def test_perplexity_is_that_of_cross_entropy(tmp_path, capsys):
    config = worlds.make(tmp_path)
    quick = ["evaluation.exact_match=false", "generation.num_samples=0"]
    plain = evaluated(config, capsys, *quick)
    assert "nll" not in plain
    assert plain["perplexity"] == pytest.approx(np.exp(plain["loss"]))
    for option in ("label_smoothing=0.2", "z_loss=0.1"):
        found = evaluated(config, capsys, *quick, f"objective.{option}")
        assert found["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
        assert found["nll"] == pytest.approx(plain["loss"], rel=1e-5)
        assert abs(found["loss"] - plain["loss"]) > 1e-3


def test_each_batch_has_draws_of_its_own(tmp_path):
    config = load.load(worlds.make(tmp_path), ["generation.temperature=1"])
    tuned = artefact.open_base(config, assemble.opened(config))
    rows = completions.left_padded([[5, 6, 7]] * 8, 32)
    draw = samples.generator(tuned.parts, tuned.params)
    first, second = draw(*rows), draw(*rows)
    assert first != second
    assert len({tuple(row) for row in first + second}) == 16
    again = samples.generator(tuned.parts, tuned.params)
    assert (again(*rows), again(*rows)) == (first, second)
