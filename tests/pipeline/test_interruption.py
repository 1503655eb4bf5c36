"""Ctrl-C and SIGKILL of the command itself, with the Ray that it starts."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.pipeline.folder import RunFolder

DEADLINE = 120.0


def start(folder):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.run_fakes", str(folder)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_call(folder, node):
    deadline = time.monotonic() + DEADLINE
    while not (folder / "calls.log").exists() or f"START {node} " not in (folder / "calls.log").read_text():
        assert time.monotonic() < deadline, "the step was never called"
        time.sleep(0.1)


def workers_have_gone(folder):
    """Whether no worker holds the run's folder any more."""
    with (folder / "run" / ".workers.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("signals", ["interrupt", "kill"])
def test_a_stopped_command_keeps_what_is_done_and_the_next_one_goes_on(tmp_path, signals):
    (tmp_path / "control.json").write_text(json.dumps({"one.data": {"do": "sleep", "seconds": 300}}))
    process = start(tmp_path)
    wait_for_call(tmp_path, "one.data")
    sessions = set(Path("/tmp").glob(f"posttrain-{process.pid}-*"))
    assert sessions
    process.send_signal(signal.SIGINT if signals == "interrupt" else signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    if signals == "interrupt":
        assert process.returncode == 2
        (line,) = err.strip().splitlines()
        assert line == f"{tmp_path}/run: stopped; the same command goes on from here"
    assert (tmp_path / "run" / "stages" / "00-base" / "model" / "artifact.json").exists()

    (tmp_path / "control.json").write_text("{}")
    (tmp_path / "calls.log").unlink()
    again = start(tmp_path)
    out, err = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0, err
    assert "base: done before, kept" in out
    assert "START base " not in (tmp_path / "calls.log").read_text()
    nodes = RunFolder(tmp_path / "run").read_manifest()["nodes"]
    assert {node["state"] for node in nodes.values()} == {"done"}
    assert workers_have_gone(tmp_path)
    assert not any(session.exists() for session in sessions), "the local Ray's folder stays behind"


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_still_imported_ends_with_one_line(tmp_path):
    """An import that goes on beside the first node meets a Ray that is gone already, which ends the process in C++ code."""
    process = start(tmp_path)
    manifest = tmp_path / "run" / "manifest.json"
    deadline = time.monotonic() + DEADLINE
    while not manifest.exists() or '"running"' not in manifest.read_text():
        assert time.monotonic() < deadline and process.poll() is None, "no node was started"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (2, f"{tmp_path}/run: stopped; the same command goes on from here\n")
