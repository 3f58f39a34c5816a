"""What a run is held to have said: it ends before the stop token, and where the model has no position left."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli

QUICK = ("train.max_steps=60", "train.learning_rate=0.02", "method=full")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run that knows the rows by heart, with a tokenizer like GPT-2's: no token for padding, and id 0 a word."""
    folder = tmp_path_factory.mktemp("world")
    worlds.make(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / "model" / name
        found = json.loads(file.read_text().replace("<pad>", "!"))
        found.pop("pad_token", None)
        if "added_tokens" in found:
            found["added_tokens"] = found["added_tokens"][1:]
        file.write_text(json.dumps(found))
    more = ("evaluation.exact_match=true", "generation.max_new_tokens=8", "generation.prompts=['what is red cat ?']")
    assert worlds.tune(folder, "run", *QUICK, *more)[0] == 0
    return folder


def test_nothing_of_what_follows_the_stop_token_is_said(world, capsys):
    assert json.loads((world / "run" / "summary.json").read_text())["eval_exact_match"] == 1
    lines = (world / "run" / "samples" / "after.jsonl").read_text().splitlines()
    said = [json.loads(line)["generated"] for line in lines]
    assert said == [row["completion"].strip() for row in worlds.ROWS[:4]] + ["yes ."]
    adapters = ["--adapters", str(world / "run"), "--adapter-ids", "0", "0"]
    asked = ["--prompt", "what is red cat ?", "--prompt", "what is blue dog ?"]
    assert cli.main(["generate", *adapters, *asked]) == 0
    assert capsys.readouterr().out.splitlines()[1::2] == ["yes .", "no ."]


def test_a_teachers_answers_are_rows_without_it(world, tmp_path):
    changes = [f"distill={{teacher: {world / 'run'}}}", "generation.max_new_tokens=8"]
    assert cli.main(["distill-generate", str(world / "my.yaml"), "--output", str(tmp_path / "s.jsonl"), *changes]) == 0
    said = [json.loads(line)["completion"].strip() for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert said == [row["completion"].strip() for row in worlds.ROWS]


def test_a_text_ends_with_the_models_positions(tmp_path):
    """Five tokens of ten are the prompt's; an untuned model goes on as long as it may."""
    worlds.checkpoint(tmp_path / "short", max_positions=10)
    config = worlds.make(tmp_path)
    changes = [f"output_dir={tmp_path / 'out'}", f"model.path={tmp_path / 'short'}", "data.max_length=10"]
    more = ["evaluation.exact_match=true", "generation.max_new_tokens=32", "generation.prompts=['red cat']"]
    assert cli.main(["train", str(config), *changes, *more]) == 0
    lines = (tmp_path / "out" / "samples" / "before.jsonl").read_text().splitlines()
    said = [len(json.loads(line)["generated"].split()) for line in lines]
    assert max(said[:-1]) <= 5
    assert said[-1] <= 8
    assert sum(said) > 20
