"""A disk that fills up while a checkpoint is written: one line, the checkpoint before survives, the next run goes on from it."""

from __future__ import annotations

import os
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from posttrain.config.errors import UserError
from posttrain.model import loading
from posttrain.pipeline import failures
from posttrain.pipeline.failures import explain_failure
from posttrain.stages import checkpoints, run
from posttrain.stages.job import StageJob
from tests.stages.crash import differing
from tests.stages.tasks import SFT, make_job

STAGE = {**SFT, "keep_checkpoints": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> StageJob:
    """The stage trained without a fault."""
    job = make_job(tmp_path_factory.mktemp("whole"), STAGE)
    run.train(job, job.inputs["model"])
    return job


def train_until_full(job: StageJob) -> UserError:
    """Train, and what a person is told."""
    with pytest.raises(Exception) as raised:  # tokenizers raises it bare  # noqa: B017, PT011
        run.train(job, job.inputs["model"])
    told = explain_failure(raised.value, "sft", job.checkpoints / "train.log")
    assert isinstance(told, UserError), told
    assert "no space left on the disk" in str(told) and "\n" not in str(told)
    assert checkpoints.last_complete(job.checkpoints) == job.checkpoints / "checkpoint-2"
    assert not job.inputs["model"].exists()
    return told


@pytest.mark.parametrize(
    ("owner", "writer", "file", "error"),
    [
        (
            loading,
            "save_file",
            "model.safetensors",
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ),
        (torch, "save", "optimizer.pt", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")),
        (torch, "save", "scheduler.pt", RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        (torch, "save", "rng_state.pth", OSError(28, "No space left on device")),
    ],
    ids=["weights", "optimizer", "scheduler", "random states"],
)
def test_each_file_of_a_checkpoint_may_be_the_one_that_does_not_fit(
    owner: Any, writer: str, file: str, error: Exception, whole: StageJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, STAGE)
    original = getattr(owner, writer)

    def write(content: Any, path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).endswith(f"checkpoint-4/{file}"):
            Path(path).write_bytes(b"half")
            raise error
        return original(content, path, *rest, **options)

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(owner, writer, write)
        patch.setattr(failures.shutil, "disk_usage", lambda _: usage(100, 100, 0))
        train_until_full(job)
    run.train(job, job.inputs["model"])
    assert differing(whole.inputs["model"], job.inputs["model"]) == []


@pytest.fixture
def small_disk(whole: StageJob, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[StageJob]:
    """A job whose checkpoints lie on a disk that holds one and a part (in percent) of another."""
    job = make_job(tmp_path, STAGE)
    job.checkpoints.mkdir(parents=True)
    size = sum(file.stat().st_size for file in (whole.checkpoints / "checkpoint-6").iterdir())
    options = f"size={size * (100 + request.param) // 100}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(job.checkpoints)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk can be mounted by root alone")
    yield job
    subprocess.run(["umount", str(job.checkpoints)], check=True)


@pytest.mark.parametrize("small_disk", [5, 40, 90], indirect=True)
def test_a_disk_that_is_really_full(whole: StageJob, small_disk: StageJob) -> None:
    train_until_full(small_disk)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk.checkpoints)], check=True)
    run.train(small_disk, small_disk.inputs["model"])
    assert differing(whole.inputs["model"], small_disk.inputs["model"]) == []
    assert checkpoints.last_complete(small_disk.checkpoints) == small_disk.checkpoints / "checkpoint-6"
