import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunejax.train import compiler


@pytest.mark.parametrize("runs", [None, 1, compiler.SHORT, compiler.SHORT + 1])
def test_the_backend_takes_the_options_and_the_program_says_the_same(monkeypatch, runs):
    monkeypatch.setenv("XLA_FLAGS", "")
    program = jax.jit(lambda x: jnp.tanh(x) @ x.T, compiler_options=compiler.options(runs))
    x = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_allclose(program(x), np.tanh(x) @ x.T, rtol=1e-6)


def test_the_rarer_a_program_runs_the_less_is_spent_on_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    once, short, often = (compiler.options(runs) for runs in (1, 2, 33))
    assert once["xla_backend_optimization_level"] == 0 < short["xla_backend_optimization_level"]
    assert not short["xla_cpu_use_fusion_emitters"]
    assert "xla_cpu_use_fusion_emitters" not in often
    assert compiler.options() == often


def test_what_the_environment_says_is_not_overruled(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true")
    assert [compiler.options(runs) for runs in (None, 1, 2)] == [None] * 3


@pytest.mark.parametrize("enabled", [True, False])
def test_no_collection_while_tracing_and_the_collector_is_left_as_it_was(enabled):
    def fail():
        with compiler.tracing():
            seen.append(gc.isenabled())
            raise ZeroDivisionError

    seen = []
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert (seen, gc.isenabled()) == ([False], enabled)
    finally:
        gc.enable()
