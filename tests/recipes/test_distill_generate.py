"""`tunejax distill-generate`: the teacher's answers as rows, and a student that learns from the text alone."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli
from tunejax.recipes import distill_generate

QUICK = ("data.eval_path=null", "train.max_steps=60", "train.learning_rate=0.02", "method=full")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a run that knows the rows by heart, the teacher."""
    folder = tmp_path_factory.mktemp("world")
    worlds.make(folder)
    assert worlds.tune(folder, "big", *QUICK)[0] == 0
    return folder


def write(world, output, *changes):
    section = f"distill={{teacher: {world / 'big'}}}"
    return cli.main(["distill-generate", str(world / "my.yaml"), section, "--output", str(output), *changes])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_teachers_answers_stand_in_the_rows_and_teach(world, tmp_path, capsys):
    """The rows' own answers are wrong here: what the student says is the teacher's."""
    wrong = worlds.jsonl(tmp_path / "wrong.jsonl", [{**r, "completion": " one .", "id": i} for i, r in
                                                    enumerate(worlds.ROWS)])  # fmt: skip
    assert write(world, tmp_path / "said.jsonl", f"data.path={wrong}", "train.eval_batch_size=3") == 0
    assert "8 rows" in capsys.readouterr().out
    assert read(tmp_path / "said.jsonl") == [{**r, "id": i} for i, r in enumerate(worlds.ROWS)]
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []
    rows = worlds.tune(world, "small", *QUICK, f"data.path={tmp_path / 'said.jsonl'}", "model.layers=[1]")
    assert rows[0] == 0
    assert rows[1][-1]["loss"] < 0.5 * rows[1][0]["loss"]


def test_prompts_are_whole_where_they_are_in_the_loss(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME_OF_IT", str(world))
    rows = worlds.jsonl(tmp_path / "rows.jsonl", [*worlds.ROWS, "no row"])
    more = [f"data.path={rows}", "data.on_bad_row=skip", "data.completion_only_loss=false"]
    section = "distill={teacher: $HOME_OF_IT/big}"
    assert cli.main(["distill-generate", str(world / "my.yaml"), section, "--output", str(tmp_path / "s"), *more]) == 0
    assert read(tmp_path / "s") == worlds.ROWS


def test_several_answers_are_drawn_and_a_killed_writer_goes_on(world, tmp_path, monkeypatch):
    options = ["--samples", "2", "--keep-unfinished", "generation.temperature=3.0", "train.eval_batch_size=3"]
    assert write(world, tmp_path / "whole.jsonl", *options) == 0
    whole = read(tmp_path / "whole.jsonl")
    assert [r["prompt"] for r in whole] == [r["prompt"] for r in worlds.ROWS for _ in range(2)]
    assert len({r["completion"] for r in whole}) > 4
    calls, answers = [], distill_generate._answers

    def dies(*args):
        calls.append(args[5])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answers(*args)

    monkeypatch.setattr(distill_generate, "_answers", dies)
    assert write(world, tmp_path / "again.jsonl", *options) == cli.INTERRUPTED
    half = tmp_path / ".again.jsonl.part"
    half.write_text(half.read_text() + '[["half a li')
    assert not (tmp_path / "again.jsonl").exists()
    assert write(world, tmp_path / "again.jsonl", *options) == 0
    assert calls == [0, 1, 2, 2]
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_does_not_end_is_left_out(world, tmp_path, capsys):
    assert write(world, tmp_path / "none.jsonl", "generation.max_new_tokens=1") == 0
    said = capsys.readouterr().out
    assert "none.jsonl: 0 rows" in said
    assert "8 answers did not end within generation.max_new_tokens=1: left out" in said


def test_messages_end_with_the_first_answer():
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    got = distill_generate.answered({"messages": turns, "id": 3}, " said ")
    assert got == {"messages": [turns[0], {"role": "assistant", "content": "said"}], "id": 3}
    assert turns[1]["content"] == "b"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["distill=null"], "needs distill.teacher"),
        (["--samples", "2"], "generation.temperature above 0"),
        (["generation.max_new_tokens=100"], "the teacher has 64 positions"),
        (["objective.name=classification"], "goes with objective.name: causal_lm"),
    ],
)
def test_what_cannot_be_written_is_told(world, tmp_path, capsys, changes, says):
    assert write(world, tmp_path / "out.jsonl", *changes) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "there.jsonl").write_text("mine")
    assert write(world, tmp_path / "there.jsonl") == 2
    assert (tmp_path / "there.jsonl").read_text() == "mine"
