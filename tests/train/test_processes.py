"""Runs that are killed, stopped, moved to another mesh, or spread over two processes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("worker.py")
KILLS = int(os.environ.get("TUNEJAX_KILLS", "3"))
MASK_KILLS = int(os.environ.get("TUNEJAX_KILLS", "2"))
STEPS = max(30, 3 * KILLS)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _programs_are_kept(tmp_path_factory):
    """From one process to the next, as a run keeps them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def start(folder, *args):
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(WORKER), str(folder), "--steps", str(STEPS), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    return next((json.loads(line) for line in out.splitlines() if line.startswith("{")), {})


def wait_for_lines(process, path, lines):
    """Until the run has logged so many steps; fails where it ends first."""
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return finish(start(folder)), dict(np.load(folder / "arrays.npz")), (folder / "metrics.jsonl").read_text()


def losses_of(text):
    return {row["step"]: row["loss"] for row in map(json.loads, text.splitlines()) if "loss" in row}


def test_killed_and_resumed_ends_in_the_same_bytes(uninterrupted, tmp_path):
    _, want, log = uninterrupted
    rng, path, hit = random.Random(0), tmp_path / "metrics.jsonl", 0
    for n in range(KILLS):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start(tmp_path, "--pause", 0.05)
        # One kill in five comes during the start-up, the others once this process has begun to write.
        while n % 5 != 4 and process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, max(0.4, 3 / KILLS)))
        hit += process.poll() is None
        process.kill()
        process.communicate()
    assert hit > KILLS // 2
    finish(start(tmp_path))
    got = dict(np.load(tmp_path / "arrays.npz"))
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert losses_of((tmp_path / "metrics.jsonl").read_text()) == losses_of(log)


def test_killed_while_units_are_masked(tmp_path):
    """At random steps of the schedule: the same weights, scores and masks, bit by bit."""
    whole, folder, steps = tmp_path / "whole", tmp_path / "killed", max(20, 2 * MASK_KILLS)
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    options = ("--method", "shrink", "--steps", steps, f"--xla={' '.join(flags)}")
    finish(start(whole, *options))
    begin, end = 3, steps - 4
    for step in sorted(random.Random(0).sample(range(begin, end), MASK_KILLS)):
        process = start(folder, *options, "--pause", 0.05)
        wait_for_lines(process, folder / "metrics.jsonl", step)
        assert process.poll() is None
        process.kill()
        process.communicate()
        assert begin <= max(losses_of((folder / "metrics.jsonl").read_text())) < end
    finish(start(folder, *options))
    want, got = (dict(np.load(f / "arrays.npz")) for f in (whole, folder))
    kept = {name: x.sum(-1).tolist() for name, x in want.items() if "'kept'" in name}
    assert sorted(kept.values()) == [[1] * 3, [2], [12], [12] * 3]
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].tobytes() == array.tobytes(), name


def test_sigterm_saves_and_a_second_run_goes_on_from_there(uninterrupted, tmp_path):
    process = start(tmp_path, "--pause", 0.05)
    wait_for_lines(process, tmp_path / "metrics.jsonl", 4)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped["stopped"] == "SIGTERM"
    assert 0 < stopped["step"] < STEPS
    again = finish(start(tmp_path))
    assert again["resumed_from"] == stopped["step"]
    for name, array in np.load(tmp_path / "arrays.npz").items():
        np.testing.assert_array_equal(array, uninterrupted[1][name])


def test_resumed_on_another_mesh(uninterrupted, tmp_path):
    first = start(tmp_path, "--pause", 0.05)
    wait_for_lines(first, tmp_path / "metrics.jsonl", 8)
    first.send_signal(signal.SIGTERM)
    at = finish(first)["step"]
    rest = finish(start(tmp_path, "--devices", 8, "--mesh", "2,2,2"))
    assert rest["resumed_from"] == at
    np.testing.assert_allclose(rest["losses"], uninterrupted[0]["losses"][at:], atol=1e-5)


def test_two_processes_give_the_losses_of_one_and_resume(uninterrupted, tmp_path):
    losses = []
    for steps in (12, STEPS):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = ("--port", port, "--devices", 2, "--mesh", "2,2,1", "--steps", steps)
        both = [start(tmp_path, "--process", f"{i}/2", *common) for i in range(2)]
        first, _ = finish(both[0]), finish(both[1])
        assert first["resumed_from"] == len(losses)
        losses += first["losses"]
    np.testing.assert_allclose(losses, uninterrupted[0]["losses"], atol=1e-5)
