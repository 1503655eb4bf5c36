"""What a step sees of the machine's GPUs."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from posttrain.cluster.environment import set_driver_environment
from posttrain.pipeline.work import WorkOrder, execute
from tests.pipeline.configs import make_config, sft

VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(("gpus", "seen"), [(False, ""), (True, "3")])
def test_a_step_that_asked_for_no_gpu_sees_none_from_the_import_of_its_module_on(tmp_path, monkeypatch, gpus, seen):
    module = ModuleType("shows_gpus")
    found = []
    monkeypatch.setattr(module, "prepare", lambda job, folder: found.append(os.environ[VISIBLE]), raising=False)

    def load(name):
        found.append(os.environ[VISIBLE])
        return module

    monkeypatch.setenv(VISIBLE, "3")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[execute.__module__], "load_steps", load)
    job = {
        "name": "one", "config": make_config(tmp_path, {"one": sft()}), "folder": tmp_path, "inputs": {},
        "metrics_path": tmp_path / "metrics.jsonl",
    }  # fmt: skip
    (tmp_path / "lock").touch()
    order = WorkOrder(
        steps="shows_gpus", step="prepare", job=job, folder=tmp_path / "out", threads=1, gpus=gpus, log=tmp_path / "log",
        lock=tmp_path / "lock", directory=tmp_path,
    )  # fmt: skip
    execute(order)
    assert found == [seen, seen]


def test_ray_is_told_to_hide_gpus_from_tasks_that_ask_for_none(monkeypatch):
    from ray._private.accelerators.accelerator import RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR as NAME

    monkeypatch.delenv(NAME, raising=False)
    set_driver_environment(local=False)
    assert os.environ[NAME] == "1"
