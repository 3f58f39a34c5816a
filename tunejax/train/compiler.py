"""What the compiler is told: programs that run for many steps, and those that run once."""

import os

import jax

CPU = {"xla_backend_optimization_level": 2}
"""LLVM's -O2. XLA's own choice, -O3, compiles a step a tenth longer, for steps that are no faster (benchmarks/)."""


CPU_ONCE = {"xla_backend_optimization_level": 0}
"""For a program that runs once: it compiles in half the time, beside the step that every start waits for."""


def options(once: bool = False) -> dict[str, int] | None:
    """Options for `jax.jit` on this backend; what XLA_FLAGS names stays as it says there.

    once: the program runs a single time, so that compiling it costs more than running it.
    """
    if jax.default_backend() != "cpu":
        return None
    said = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in (CPU_ONCE if once else CPU).items() if name not in said} or None
