"""Prompts of `tunejax generate` and of a config: in the form of the rows that a run was trained on, or refused."""

import argparse

import pytest
import worlds

from tunejax import cli
from tunejax.recipes import artefact, generate

PLAIN = argparse.Namespace(chat=False, raw=False)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEJAX_CACHE", str(tmp_path / "cache"))
    return worlds.make(tmp_path)


def trained(path, rows, *changes):
    """The folder of a run of one step on rows, whose format their keys alone tell."""
    out = path.parent / "run"
    data = f"data={{path: {worlds.jsonl(path.parent / 'rows.jsonl', rows)}, max_length: 32}}"
    assert cli.main(["train", str(path), data, f"output_dir={out}", "train.max_steps=1", *changes]) == 0
    return out


def test_a_run_on_chats_is_asked_in_turns(path):
    chat = {"messages": [{"role": "user", "content": "red cat ?"}, {"role": "assistant", "content": "yes"}]}
    out = trained(path, [chat] * 8, "generation.prompts=['red cat ?']")
    tuned = artefact.open_run(str(out))
    asked = tuned.parts.tokenizer.decode(generate.ids(tuned, "red cat ?", PLAIN))
    assert asked == tuned.parts.tokenizer.decode(
        generate.ids(tuned, "red cat ?", argparse.Namespace(chat=True, raw=False))
    )
    assert asked != "red cat ?"


def test_a_template_with_other_fields_has_no_prompt(path, capsys):
    changes = ["data.template=what is {question} ?", "data.format=prompt_completion"]
    rows = [{"question": "red cat", "completion": " yes"}] * 8
    out = trained(path, rows, *changes)
    assert cli.main(["generate", str(out), "--prompt", "red cat"]) == 2
    assert "data.template has the field {question}" in capsys.readouterr().err
    assert cli.main(["generate", str(out), "--prompt", "what is red cat ?", "--raw"]) == 0
    fresh = ["generation.prompts=[red cat]", f"output_dir={path.parent / 'fresh'}"]
    data = f"data={{path: {path.parent / 'rows.jsonl'}, max_length: 32}}"
    assert cli.main(["train", str(path), data, *changes, *fresh]) == 2
    assert not (path.parent / "fresh").exists()
