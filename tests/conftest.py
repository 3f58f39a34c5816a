"""Shared fixtures. Tests that need the assets skip, naming what is missing, where they are absent."""

import importlib.metadata
import os
from pathlib import Path

import pytest

QUICK = (
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""Nearly all the time of the tests is XLA compiling tiny programs: without LLVM's optimisation it takes a quarter."""

if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8" + QUICK)
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


LONGEST = ("test_processes.py", "test_matrix.py", "test_compare.py", "test_many_runs.py", "test_decode.py")
"""A file's tests stay on one worker: with the long files first, no worker waits at the end for another."""


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first; the others as they were."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of small real models and data sets (TUNEJAX_ASSETS, or ../shared/assets beside the project)."""
    folder = Path(os.environ.get("TUNEJAX_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"needs the assets folder {folder} (set TUNEJAX_ASSETS)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """The compilation cache of whole commands goes to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _programs_are_given_up():
    """What one file compiled is of no use to the next: kept, it grows to gigabytes."""
    yield
    import jax

    jax.clear_caches()
