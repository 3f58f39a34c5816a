"""What the compiler is told: programs that run for many steps, and those that run once."""

import contextlib
import gc
import os
from collections.abc import Iterator

import jax

CPU = {"xla_backend_optimization_level": 2}
"""LLVM's -O2. XLA's own choice, -O3, compiles a step a tenth longer, for steps that are no faster (benchmarks/)."""


CPU_ONCE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""For a program that runs once: no passes of LLVM or MLIR, so that it compiles in a quarter of the time, beside the
step that every start waits for."""


def options(once: bool = False) -> dict[str, int | bool] | None:
    """Options for `jax.jit` on this backend; what XLA_FLAGS names stays as it says there.

    once: the program runs a single time, so that compiling it costs more than running it.
    """
    if jax.default_backend() != "cpu":
        return None
    said = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in (CPU_ONCE if once else CPU).items() if name not in said} or None


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
