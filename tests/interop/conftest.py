"""AdapterHub's library `adapters`, in an interpreter of its own (`hub_side`), and models that it made."""

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def hub():
    """(call, **arguments) -> what the other library answers; its interpreter runs once."""
    python = os.environ.get("TUNEJAX_HUB_PYTHON")
    if not python:
        pytest.skip("needs TUNEJAX_HUB_PYTHON, an interpreter that has adapters 1.3.0")
    quiet = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    quiet.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [python, str(HERE / "hub_side.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet
    )

    def call(name, **arguments):
        print(json.dumps({"call": name, **{k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}}),
              file=process.stdin, flush=True)  # fmt: skip
        answer = json.loads(process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    with process:
        yield call
        process.stdin.close()


@pytest.fixture(scope="session")
def bases(hub, tmp_path_factory):
    """Kind of model -> its folder, made once."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        hub("base", kind=kind, out=folder)
        return folder

    return make
