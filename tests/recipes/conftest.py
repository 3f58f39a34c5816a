"""Whole commands compile the same small programs again and again: here the compilation cache keeps those too."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="module", autouse=True)
def _small_programs_are_kept(tmp_path_factory):
    kept = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp() / "programs"))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
