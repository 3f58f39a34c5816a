"""JAX's settings for a process: several hosts, and the cache of compiled programs."""

import os
from pathlib import Path


def begin() -> None:
    """Joins the other processes of the run, if there are any, and turns the compilation cache on.

    Several processes: set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or run on a Cloud TPU slice,
    which says so itself. The cache lies in JAX_COMPILATION_CACHE_DIR, or TUNEJAX_CACHE, or ~/.cache/tunejax.
    """
    import jax

    if _several() and not jax.distributed.is_initialized():
        _join()
    if not jax.config.values.get("jax_compilation_cache_dir"):
        home = os.environ.get("TUNEJAX_CACHE") or Path.home() / ".cache" / "tunejax"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def devices() -> str:
    """How many devices of what kind: "8 x TPU v5e"."""
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _several() -> bool:
    return "JAX_COORDINATOR_ADDRESS" in os.environ or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _join() -> None:
    import jax

    number, index = (os.environ.get(f"JAX_{n}") for n in ("NUM_PROCESSES", "PROCESS_ID"))
    if number is None or index is None:
        jax.distributed.initialize()  # the platform knows
        return
    jax.distributed.initialize(num_processes=int(number), process_id=int(index))
