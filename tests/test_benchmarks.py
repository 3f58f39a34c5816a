"""The benchmarks' own arithmetic; the benchmarks themselves are run by hand."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(p.relative_to(BENCHMARKS).as_posix() for p in BENCHMARKS.rglob("*.py"))


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark script imported beside its folder's own `common`, without the optional packages it measures."""
    file = BENCHMARKS / name
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "common", raising=False)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_imports_without_what_it_measures(name, monkeypatch):
    script(name, monkeypatch)


def test_products_are_counted_with_their_loops(monkeypatch):
    flops = script("flops.py", monkeypatch)

    def stack(x, kernels):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)
        return x @ kernels[0][:, :24]

    x, kernels = jnp.zeros((16, 32)), jnp.zeros((5, 32, 32))
    text = jax.jit(stack).lower(x, kernels).compile().as_text()
    assert flops.dots(text) == 5 * 2 * 16 * 32 * 32 + 2 * 16 * 32 * 24


def test_the_parameter_formula_is_the_model(monkeypatch):
    flops = script("flops.py", monkeypatch)
    from tunejax.models import build
    from tunejax.models.config import ModelConfig

    config = ModelConfig(family="llama", max_positions=flops.LENGTH, num_kv_heads=8, **flops.SHAPE)
    shapes = jax.eval_shape(build.build(config, head="lm").init, jax.random.key(0))
    assert flops.parameters() == sum(x.size for x in jax.tree.leaves(shapes))


def test_the_table_divides_by_eager_torch_of_the_same_round(monkeypatch):
    run = script("train_speed/run.py", monkeypatch)
    figures = {"peak_mb": 100, "first_step_s": 5, "mode": "lora"}
    rows = [
        {"name": name, "round": i, "tokens_per_s": speed, **figures}
        for i, (ours, theirs) in enumerate([(50, 100), (40, 40), (30, 40)])
        for name, speed in (("tunejax", ours), ("torch_eager", theirs))
    ]
    assert "| tunejax | 40 | 0.75 (0.50 to 1.00) |" in run.table(rows, "lora")


def sst2_pair(seed: int, theirs: float, ours: float, losses: list[float], **changed: float) -> list[dict]:
    """Results of one seed: accuracies, and what the second side's losses are besides 1.0 everywhere."""
    same = {"method": "lora", "seed": seed, "steps": 30, "trained": 10, "before": 0.5, "rates": [1e-3] * 30}
    torch = {**same, "side": "torch", "accuracy": theirs, "losses": [1.0] * 30}
    return [torch, {**same, "side": "tunejax", "accuracy": ours, "losses": losses, **changed}]


def test_sst2_accuracies_are_means_and_spreads_over_seeds(monkeypatch, capsys):
    run = script("sst2_parity/run.py", monkeypatch)
    first, second = [1.0] * 19 + [1.25] + [1.0] * 10, [1.0] * 25 + [3.0] + [1.0] * 4
    assert run.table(sst2_pair(0, 0.84, 0.85, first) + sst2_pair(1, 0.86, 0.85, second)) == 0
    assert "| lora | 85.00 ± 1.41 | 85.00 ± 0.00 | +0.00 | 2.5e-01 | 2.0e+00 |" in capsys.readouterr().out


def test_sst2_fails_where_tunejax_is_worse_or_the_runs_are_not_the_same(monkeypatch, capsys):
    run = script("sst2_parity/run.py", monkeypatch)
    assert run.table(sst2_pair(0, 0.85, 0.846, [1.0] * 30)) == 0
    assert run.table(sst2_pair(0, 0.85, 0.844, [1.0] * 30)) == 1
    assert run.table(sst2_pair(0, 0.85, 0.85, [1.0] * 30, trained=11)) == 1
    assert "trained: 10 and 11" in capsys.readouterr().err
    assert run.table(sst2_pair(0, 0.85, 0.85, [1.0] * 30, rates=[1e-3] * 29 + [9e-4])) == 1
    assert "learning rates differ by 1.0e-04" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["full", "lora", "bitfit"])
def test_sst2_runs_the_shipped_config(method, monkeypatch, tmp_path):
    from tunejax.config import load

    common = script("sst2_parity/common.py", monkeypatch)
    args = argparse.Namespace(method=method, seed=2, steps=None, folder=tmp_path)
    shipped = load.load(BENCHMARKS.parent / "configs/sst2" / f"{method}.yaml")
    changed = load.differences(common.config(args), shipped)
    assert {k for k in changed if k.split(".")[0] not in ("seed", "output_dir")} == {
        "model.path", "train.logging_steps", "train.eval_steps", "train.save_steps", "train.report_to", "train.progress"
    }  # fmt: skip


def test_sst2_refuses_a_config_that_torch_does_not_follow(monkeypatch, tmp_path):
    common = script("sst2_parity/common.py", monkeypatch)
    monkeypatch.setattr(common, "overrides", lambda args: ["model.dropout=0.1", "train.optim=lion"])
    with pytest.raises(SystemExit, match=r"model\.dropout is 0; train\.optim is adamw"):
        common.config(argparse.Namespace(method="lora", seed=0, steps=None, folder=tmp_path))


def test_sst2_accuracies_compare_equal_across_number_types(monkeypatch, capsys):
    common = script("sst2_parity/common.py", monkeypatch)
    args = argparse.Namespace(method="lora", seed=0)
    for x in (238 / 436, float(jnp.float32(238) / jnp.float32(436))):
        common.report("torch", args, [{"loss": 0.5, "learning_rate": 0.1}], before=x)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
