"""What a run is held to have said: it ends before the stop token, and where the model has no position left."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.recipes import artefact, samples

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
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


def test_an_answer_is_told_from_its_prompt_where_both_are_in_the_loss(world, tmp_path):
    changes = [f"output_dir={tmp_path / 'out'}", "data.completion_only_loss=false", "evaluation.exact_match=true"]
    assert cli.main(["train", str(world / "my.yaml"), *QUICK, *changes]) == 0
    asked = [json.loads(line) for line in (tmp_path / "out" / "samples" / "after.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in asked] == [row["prompt"] for row in worlds.ROWS[:4]]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["eval_exact_match"] == 1


def rewritten(file, change):
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def test_a_turn_ends_with_the_token_that_the_template_closes_it_with(tmp_path, capsys):
    """As ChatML on a base model: its end of a turn is not its end of a text."""
    config = worlds.make(tmp_path)
    words = {"user": 2, "assistant": 1}

    def add(found):
        vocab = found["model"]["vocab"]
        for word in ("<end>", *words):
            vocab[word] = len(vocab)
        one = {**found["added_tokens"][0], "id": vocab["<end>"], "content": "<end>"}
        found["added_tokens"].append(one)

    shutil.rmtree(tmp_path / "model")
    worlds.checkpoint(tmp_path / "model", room=3)
    rewritten(tmp_path / "model" / "tokenizer.json", add)
    rewritten(tmp_path / "model" / "tokenizer_config.json", lambda found: found.update(chat_template=CHATML))
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in worlds.ROWS
    ]
    data = worlds.jsonl(tmp_path / "chats.jsonl", chats)
    changes = [f"data.path={data}", f"data.eval_path={data}", "evaluation.exact_match=true", "data.max_length=32"]
    assert cli.main(["train", str(config), *QUICK, *changes, "generation.max_new_tokens=8"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval_exact_match"] == 1
    capsys.readouterr()
    assert cli.main(["generate", str(tmp_path / "run"), "--prompt", "what is red cat ?"]) == 0
    assert capsys.readouterr().out.strip() == "yes ."


def test_config_json_names_what_ends_a_text(tmp_path):
    worlds.make(tmp_path)
    rewritten(tmp_path / "model" / "config.json", lambda found: found.update(eos_token_id=[2, 5]))
    assert samples.stop_tokens(artefact.plain(str(tmp_path / "model"), "float32").parts) == (2, 5)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert samples.stop_tokens(artefact.plain(str(tmp_path / "model"), "float32").parts) == (2, 7)


def test_a_prompt_goes_on_where_a_tokenizer_closes_texts(tmp_path):
    worlds.make(tmp_path)
    between = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, *between],
        "pair": [*between, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in ((1, "<s>"), (2, "</s>"))},
    }
    rewritten(tmp_path / "model" / "tokenizer.json", lambda found: found.update(post_processor=processor))
    parts = artefact.plain(str(tmp_path / "model"), "float32").parts
    assert parts.tokenizer("red cat")["input_ids"][-1] == 2
    asked = [1, *(parts.tokenizer.convert_tokens_to_ids(w) for w in ("red", "cat"))]
    assert samples.formed(parts, "red cat") == samples.unended(parts.tokenizer, "red cat") == asked
