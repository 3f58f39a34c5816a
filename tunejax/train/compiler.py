"""What the compiler is told: as much as a program is worth that runs so often."""

import contextlib
import gc
import os
from collections.abc import Iterator

import jax

CPU = {"xla_backend_optimization_level": 2}
"""LLVM's -O2. XLA's own choice, -O3, compiles a step a tenth longer, for steps that are no faster (benchmarks/)."""

CPU_SHORT = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
"""LLVM's -O1, and the emitters that lower a kernel without MLIR's passes: a third less time to compile, for steps that
take 1 to 10% longer (benchmarks/)."""

CPU_ONCE = CPU_SHORT | {"xla_backend_optimization_level": 0}
"""Next to no passes at all: a quarter of the time to compile."""

SHORT = 32
"""So many runs, or fewer, do not make up for the longer compilation, where a step takes a third of a second."""


def options(runs: int | None = None) -> dict[str, int | bool] | None:
    """Options for `jax.jit` on this backend; what XLA_FLAGS names stays as it says there.

    runs: how often the program will run, as far as is known; None for often.
    """
    if jax.default_backend() != "cpu":
        return None
    said = os.environ.get("XLA_FLAGS", "")
    wanted = CPU_ONCE if runs == 1 else CPU_SHORT if runs is not None and runs <= SHORT else CPU
    return {name: value for name, value in wanted.items() if name not in said} or None


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Holds Python's garbage collector back: tracing makes many objects that live, and collecting looks at them all."""
    held = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if held:
            gc.enable()
