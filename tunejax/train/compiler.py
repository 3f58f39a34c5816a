"""What the compiler is told about programs that run for many steps."""

import os

import jax

CPU = {"xla_backend_optimization_level": 2}
"""LLVM's -O2. XLA's own choice, -O3, compiles a step a tenth longer, for steps that are no faster (benchmarks/)."""


def options() -> dict[str, int] | None:
    """Options for `jax.jit` on this backend; what XLA_FLAGS names stays as it says there."""
    if jax.default_backend() != "cpu":
        return None
    said = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in CPU.items() if name not in said} or None
