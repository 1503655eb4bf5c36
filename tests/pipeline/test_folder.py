"""The run folder: one process at a time, stage folders, manifest."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time

import pytest

from posttrain.config.errors import UserError
from posttrain.pipeline import folder as folder_module
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.graph import build_graph
from tests.pipeline.configs import make_config, sft

HOLD = """
import sys, time
from posttrain.pipeline.folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_the_first_ones_pid(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"pid {process.pid}"), RunFolder(tmp_path).locked():
            pass
    finally:
        process.kill()
        process.wait(10)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.wait(10)
    with RunFolder(tmp_path).locked():
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_run_waits_for_workers_of_a_killed_one_and_gives_up_after_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "WORKER_DEADLINE", 0.3)
    folder = RunFolder(tmp_path)
    with folder.worker_lock_path.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        start = time.monotonic()
        with pytest.raises(UserError, match="workers of an earlier run"), folder.locked():
            pass
        assert time.monotonic() - start >= 0.3
    with folder.locked():
        pass


def test_stage_folders_are_numbered_in_order_and_keep_their_number(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.make_stage_folder("base").name == "00-base"
    assert folder.make_stage_folder("b").name == "01-b"
    assert folder.make_stage_folder("a").name == "02-a"
    assert folder.make_stage_folder("b").name == "01-b"
    assert (folder.stage_folder("a") / "logs").is_dir()


def test_the_manifest_records_states_parents_versions_and_seed(tmp_path):
    folder = RunFolder(tmp_path)
    graph = build_graph(make_config(tmp_path, {"one": sft()}))
    folder.write_manifest(graph, {name: "pending" for name in graph}, {}, name="run", seed=3)
    manifest = folder.read_manifest()
    assert manifest["seed"] == 3 and manifest["nodes"]["one"]["parents"] == ["base", "one.data"]
    assert manifest["nodes"]["one"]["state"] == "pending" and manifest["nodes"]["one"]["artifact"] is None
    assert {"python", "torch", "ray"} <= manifest["versions"].keys()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not the folder of a run"):
        RunFolder.existing(tmp_path)
