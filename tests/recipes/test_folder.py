"""The run folder: whose it is, what may change, and files that are whole or not there."""

import json
import math

import pytest

from tunejax import plots
from tunejax.config import load
from tunejax.core import errors
from tunejax.recipes import folder


def config(path, **train):
    raw = {"output_dir": str(path), "data": {"path": "x.jsonl"}, "method": "full", "train": train}
    return load.check(raw)


def test_the_same_config_resumes_and_another_is_told_what_differs(tmp_path):
    out = tmp_path / "run"
    assert folder.claim(config(out)) == out
    assert not out.exists()
    folder.begin(config(out))
    assert folder.claim(config(out)) == out
    assert folder.claim(config(out, progress=False, report_to="none")) == out
    with pytest.raises(errors.ConfigError, match=r"train.learning_rate: 0.0002 there, 0.5 now"):
        folder.claim(config(out, learning_rate=0.5))


def test_a_student_that_writes_as_long_as_samples_are_keeps_that_length(tmp_path):
    def student(length, **on_policy):
        distill = {"teacher": "base", "alpha": 0.0, "on_policy": on_policy}
        more = {"distill": distill, "generation": {"max_new_tokens": length, "num_samples": length}}
        return load.check(config(tmp_path / str(len(on_policy))).model_dump(mode="json") | more)

    folder.begin(student(8))
    with pytest.raises(errors.ConfigError, match=r"generation.max_new_tokens: 8 there, 3 now") as caught:
        folder.claim(student(3))
    assert "num_samples" not in str(caught.value)
    folder.begin(student(8, max_new_tokens=5))
    folder.claim(student(3, max_new_tokens=5))


def test_what_json_has_no_word_for_is_null(tmp_path):
    numbers = {"loss": math.nan, "top": (1.0, math.inf), "deep": {"x": -math.inf, "n": 2}, "text": "NaN"}
    folder.write_json(tmp_path / "x.json", numbers)
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found == {"loss": None, "top": [1.0, None], "deep": {"x": None, "n": 2}, "text": "NaN"}
    assert math.isnan(folder.read_numbers(tmp_path / "x.json")["loss"])


def test_what_is_no_run_folder_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(errors.ConfigError, match="is a file"):
        folder.claim(config(tmp_path / "file"))
    with pytest.raises(errors.ConfigError, match="not empty and not a run folder"):
        folder.claim(config(tmp_path))
    with pytest.raises(errors.ConfigError, match="no run folder"):
        folder.find(str(tmp_path))
    folder.begin(config(tmp_path / "sst2"))
    with pytest.raises(errors.ConfigError, match="Did you mean 'sst2'"):
        folder.find(str(tmp_path / "sst3"))


def test_rows_of_a_file_that_a_kill_cut_short(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    folder.write_rows(path, [{"step": 1}, {"step": 2, "text": "é"}])
    path.write_text(path.read_text(encoding="utf-8") + '{"st', encoding="utf-8")
    assert folder.read_rows(path) == [{"step": 1}, {"step": 2, "text": "é"}]
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_picture_of_the_loss(tmp_path):
    rows = [{"step": i, "loss": 3.0 / i} for i in range(1, 30)] + [
        {"step": 9, "eval_loss": 1.0},
        {"step": 10, "loss": None},
    ]
    picture = plots.loss(rows, tmp_path / "plots" / "loss.png", "title")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plots.loss([{"step": 1}], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_the_running_mean_has_no_bias_at_its_start():
    assert plots.running_mean([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert plots.running_mean([0.0, 1.0])[1] == pytest.approx(1 / 1.9)
