"""Whole commands with virtual tokens: train, evaluate, generate, and the refusals on the way."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import worlds

from tunejax import cli
from tunejax.core import errors, paths
from tunejax.generate import decode
from tunejax.recipes import artefact, samples

METHOD = "method={name: prompt_tuning, num_virtual_tokens: 3, prompt_tuning_init: TEXT, prompt_tuning_init_text: a cat}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of prompt tuning, packed."""
    folder = tmp_path_factory.mktemp("world")
    config = worlds.make(folder)
    assert cli.main(["train", str(config), METHOD, "data.packing=true", "train.learning_rate=0.05"]) == 0
    return folder


def test_a_run_trains_the_rows_alone(world):
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert summary["trained_parameters"] == 3 * 16
    assert summary["eval_loss"] < summary["before_loss"]
    tuned = artefact.open_run(str(world / "run"))
    table = tuned.params["embed"]["table"]
    tokenizer = tuned.parts.tokenizer
    start = np.asarray(tuned.base["embed"]["table"])[tokenizer("a cat a")["input_ids"]]
    assert tuned.parts.prompt == (20, 21, 22)
    assert 0 < np.abs(table.lookup(jnp.arange(20, 23)) - start).max() < 1


def test_evaluate_and_generate_put_the_prompt_in_front(world, capsys):
    assert cli.main(["evaluate", str(world / "run")]) == 0
    summary = json.loads((world / "run" / "summary.json").read_text())
    found = json.loads(capsys.readouterr().out)
    for name in ("loss", "accuracy", "exact_match"):
        assert found[name] == pytest.approx(summary[f"eval_{name}"], abs=1e-6)
    tuned = artefact.open_run(str(world / "run"))
    ids = [tuned.parts.tokenizer("what is red cat ?")["input_ids"]]
    new = samples.generator(tuned.parts, tuned.params)(ids, np.ones_like(ids))
    stops = samples.stop_tokens(tuned.parts)
    by_hand = np.asarray(decode.generate(
        tuned.parts.model, tuned.params, [[20, 21, 22, *ids[0]]], max_new_tokens=4, stop_tokens=stops
    ))[0].tolist()  # fmt: skip
    assert new == [by_hand[: next((i for i, t in enumerate(by_hand) if t in stops), None)]]
    assert cli.main(["generate", str(world / "run"), "--prompt", "what is red cat ?"]) == 0
    text = tuned.parts.tokenizer.decode(new[0], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == text.strip()


def test_what_does_not_fit_is_told(world, tmp_path, capsys):
    out = f"output_dir={tmp_path / 'other'}"
    assert cli.main(["train", str(world / "my.yaml"), out, "method={name: prompt_tuning, num_virtual_tokens: 9}"]) == 2
    assert "expected at most max_length=16 less 9 virtual tokens" in capsys.readouterr().err
    assert cli.main(["export", str(world / "run"), "--output", str(tmp_path / "merged")]) == 2
    assert "embed/table: 3 virtual tokens" in capsys.readouterr().err
    long = ["method={name: prefix_tuning, length: 50}", out]
    assert cli.main(["validate", str(world / "my.yaml"), *long]) == 2
    assert "prefix_tuning takes 50 positions before it" in capsys.readouterr().err
    prompt = " ".join(["cat"] * 61)
    assert cli.main(["generate", str(world / "run"), "--prompt", prompt]) == 2
    assert "61 tokens; the model has 64 positions, 3 of them taken by prompt_tuning" in capsys.readouterr().err


def test_preprocess_shows_it(world, tmp_path, capsys):
    out = f"output_dir={tmp_path / 'other'}"
    assert cli.main(["preprocess", str(world / "my.yaml"), METHOD, out, "--rows", "1"]) == 0
    assert "<3 virtual tokens>" in capsys.readouterr().out


def test_the_base_of_the_run_is_as_it_was(world):
    tuned = artefact.open_run(str(world / "run"))
    with pytest.raises(errors.NotLinear):
        tuned.parts.method.merge(tuned.base, tuned.train, tuned.state)
    assert paths.flatten(tuned.base)["embed/table"].shape == (20, 16)
