"""The benchmarks' own arithmetic; the benchmarks themselves are run by hand."""

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
