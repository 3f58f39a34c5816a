"""`tunejax compare` on a tiny model: what it writes, going on, failures and mistakes."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax import cli, plots

MINE = '''
from tunejax.core import method
from tunejax.core.method import Start
from tunejax.core import paths


def scales():
    """Trains the final norm's scale."""

    def init(key, params):
        chosen = paths.select(params, "/norm/scale").leaves
        return Start(dict.fromkeys(chosen), dict(chosen))

    return method.method("scales", init, method.fill)
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with compare.yaml: a method of the package and one of a user's own, on two seeds."""
    folder = tmp_path_factory.mktemp("world")
    raw = yaml.safe_load(worlds.make(folder).read_text())
    (folder / "mine.py").write_text(MINE)
    del raw["method"]
    raw |= {
        "output_dir": str(folder / "runs" / "out"),
        "evaluation": {"exact_match": False},
        "generation": {"num_samples": 0},
    }
    raw["train"] |= {"eval_steps": 2, "logging_steps": 1}
    raw["compare"] = {
        "methods": {
            "full": {"method": "full", "train": {"learning_rate": 0.01}},
            "mine": {"name": f"{folder / 'mine.py'}:scales"},
        },
        "seeds": [0, 1],
        "target": 3.0,
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return folder


def run(world, *changes, file="compare.yaml"):
    return cli.main(["compare", str(world / file), *changes])


@pytest.fixture(scope="module")
def done(world):
    assert run(world) == 0
    return world / "runs" / "out"


def test_the_table_says_what_the_runs_say(done):
    lines = {x["label"]: x for x in json.loads((done / "table.json").read_text())["lines"]}
    assert list(lines) == ["full", "mine"]
    for label, x in lines.items():
        summaries = [json.loads((done / f"runs/{label}/{s}/summary.json").read_text()) for s in (0, 1)]
        assert x["metric"] == pytest.approx(sum(s["eval_loss"] for s in summaries) / 2)
        assert x["trained"] == summaries[0]["trained_parameters"]
        assert x["step_bytes"] > 4 * x["trained"]
        assert x["tokens_per_second"] > 0
    # AdamW's two moments of float32 and a few counters.
    assert lines["mine"]["trained"] == 16
    assert 8 * 16 <= lines["mine"]["optimizer_bytes"] <= 8 * 16 + 16
    assert lines["full"]["steps_to_target"] in (2.0, 3.0, 4.0)
    assert lines["mine"]["steps_to_target"] is None
    rows = list(csv.DictReader((done / "table.csv").read_text().splitlines()))
    assert {r["label"]: float(r["metric"]) for r in rows} == {k: x["metric"] for k, x in lines.items()}
    text = (done / "table.md").read_text().splitlines()
    assert text[2].startswith("| full |")  # the least loss first
    assert len(text) == 4


def test_each_run_has_its_own_settings(done):
    config = yaml.safe_load((done / "runs/full/1/config.yaml").read_text())
    assert config["train"]["learning_rate"] == 0.01
    assert config["train"]["max_steps"] == 4
    assert config["seed"] == 1
    assert yaml.safe_load((done / "runs/mine/0/config.yaml").read_text())["train"]["learning_rate"] == 2e-4


def test_the_page_needs_nothing_beside_it(done):
    page = (done / "index.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert page.count("data:image/png;base64,") == 4
    assert page.count("<tr>") == 3
    for name in ("trained", "step_bytes", "optimizer_bytes", "microseconds"):
        assert (done / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_again_trains_nothing_and_a_new_seed_alone_is_trained(world, done):
    before = {p: p.stat().st_mtime_ns for p in done.glob("runs/*/*/adapter/*")}
    only_mine = "compare.methods={mine: {name: '" + str(world / "mine.py") + ":scales'}}"
    assert run(world, "compare.seeds=[0, 1, 2]", only_mine) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (done / "runs/mine/2/summary.json").is_file()


def test_a_run_that_fails_does_not_stop_the_others(world, capsys):
    raw = yaml.safe_load((world / "compare.yaml").read_text())
    raw["output_dir"] = str(world / "failing")
    raw["compare"] |= {"seeds": [0], "methods": {"none": {"name": "lora", "targets": "nothing/kernel"}, "full": "full"}}
    (world / "failing.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    assert run(world, file="failing.yaml") == 1
    assert re.search(r"\| none \| failed \|", capsys.readouterr().out)
    text = (world / "failing/table.md").read_text()
    assert "none, seed 0: " in text
    assert "nothing/kernel" in text
    assert "| full | 2." in text or "| full | 3." in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": {}}, "compare.methods"),
        ({"seeds": [0, 0]}, "each once"),
        ({"metrik": "eval_loss"}, "Did you mean 'compare.metric'"),
        ({"methods": {"a/b": "full"}}, "'a/b' cannot be the name of a folder"),
        ({"methods": {"x": {"method": "full", "trian": {}}}}, "Did you mean 'train'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(world, capsys, change, says):
    raw = yaml.safe_load((world / "compare.yaml").read_text())
    raw["output_dir"] = str(world / "nothing")
    raw["compare"] |= change
    (world / "bad.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    assert run(world, file="bad.yaml") == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert not (world / "nothing").exists()


def test_an_unknown_metric_and_a_config_without_methods(world, done, capsys):
    raw = yaml.safe_load((world / "compare.yaml").read_text())
    raw["compare"]["metric"] = "eval_los"
    (world / "bad.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    assert run(world, file="bad.yaml") == 2
    assert "'eval_los'" in capsys.readouterr().err
    assert run(world, file="my.yaml") == 2
    assert "has no section `compare`" in capsys.readouterr().err


def test_the_front_is_what_nothing_beats():
    points = [(1, 0.5), (2, 0.4), (3, 0.9), (3, 0.8), (9, 0.9)]
    assert plots.front(points, True) == [(1, 0.5), (3, 0.9)]
    assert plots.front(points, False) == [(1, 0.5), (2, 0.4)]
