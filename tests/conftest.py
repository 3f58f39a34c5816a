"""Shared fixtures. Tests that need the assets skip, naming what is missing, where they are absent."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of small real models and data sets (TUNEJAX_ASSETS, or ../shared/assets beside the project)."""
    folder = Path(os.environ.get("TUNEJAX_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"needs the assets folder {folder} (set TUNEJAX_ASSETS)")
    return folder
