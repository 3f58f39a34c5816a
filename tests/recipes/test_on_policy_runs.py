"""On-policy distillation by whole commands: it learns, and a stopped run goes on to the same bits."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import worlds

from tunejax.train import on_policy

QUICK = ("data.eval_path=null", "train.learning_rate=0.01", "train.logging_steps=1", "method=full")
POLICY = "on_policy: {fraction: 0.7, max_new_tokens: 3}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with a run, the teacher."""
    folder = tmp_path_factory.mktemp("world")
    worlds.make(folder)
    assert worlds.tune(folder, "big", *QUICK, "train.max_steps=30")[0] == 0
    return folder


def section(world, text=POLICY):
    return f"distill={{teacher: {world / 'big'}, alpha: 0, temperature: 1.0, divergence: jensen_shannon, {text}}}"


def test_it_learns_and_goes_on_where_it_was_stopped(world, monkeypatch):
    options = (section(world), *QUICK, "train.max_steps=10", "model.layers=[1]")
    code, rows = worlds.tune(world, "whole", *options)
    assert code == 0
    assert rows[-1]["soft"] < rows[0]["soft"]
    written = on_policy.OnPolicy.written

    def stops(self, state, base, batch, at):
        if at >= 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return written(self, state, base, batch, at)

    monkeypatch.setattr(on_policy.OnPolicy, "written", stops)
    assert worlds.tune(world, "parts", *options)[0] == 0
    assert not (world / "parts" / "adapter").exists()
    monkeypatch.setattr(on_policy.OnPolicy, "written", written)
    code, again = worlds.tune(world, "parts", *options)
    assert code == 0
    np.testing.assert_array_equal([r["loss"] for r in again], [r["loss"] for r in rows])
    a, b = ((world / name / "adapter" / "adapter.safetensors").read_bytes() for name in ("whole", "parts"))
    assert a == b


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["distill.alpha=0.5"], "on_policy needs 0"),
        (["data.packing=true"], "no data.packing"),
        (["data.completion_only_loss=false"], "learns from answers alone"),
        (["distill.cache=x"], "asks the teacher about new text"),
        (["data.columns={text: prompt}", "data.format=text"], "answers prompts"),
    ],
)
def test_what_does_not_fit_is_told(world, capsys, changes, says):
    assert worlds.tune(world, "none", section(world), *QUICK, *changes)[0] == 2
    assert says in capsys.readouterr().err
