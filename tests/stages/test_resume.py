"""A stage that was ended in its middle and started again gives the same bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.errors import UserError
from posttrain.stages import checkpoints, run
from posttrain.stages.metrics import read_metrics
from tests.stages.crash import differing, train_and_crash
from tests.stages.tasks import DPO, REWARD, RL, SFT, make_job

KINDS = {"sft": {**SFT, "steps": 4}, "dpo": DPO, "rl": {**RL, "kl_coef": 0.1, "updates_per_step": 2}, "reward": REWARD}


def losses(path: Path) -> dict[int, float]:
    return {record["step"]: record["value"] for record in read_metrics(path) if record["name"] == "loss"}


@pytest.mark.parametrize("stage", KINDS.values(), ids=KINDS)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stage: dict[str, Any]) -> None:
    whole = make_job(tmp_path / "whole", stage)
    run.train(whole, whole.inputs["model"])
    broken = make_job(tmp_path / "broken", stage)
    train_and_crash(broken, broken.inputs["model"], step=3)  # one step after the checkpoint of step 2
    assert not broken.inputs["model"].exists()
    run.train(broken, broken.inputs["model"])
    assert differing(whole.inputs["model"], broken.inputs["model"]) == []
    assert differing(whole.checkpoints / "checkpoint-2", whole.inputs["model"]), "training changed nothing"
    assert losses(whole.metrics_path) == losses(broken.metrics_path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_equal_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_job(tmp_path / "whole", SFT)
    run.train(whole, whole.inputs["model"])
    broken = make_job(tmp_path / "broken", SFT)
    train_and_crash(broken, broken.inputs["model"], step=5)
    for name in ("model.safetensors", "optimizer.pt"):
        with (broken.checkpoints / "checkpoint-4" / name).open("r+b") as file:
            file.seek(100)
            file.write(b"\xff\x00\xff")
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        run.train(broken, broken.inputs["model"])
    assert [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert differing(whole.inputs["model"], broken.inputs["model"]) == []


def test_all_checkpoints_damaged_starts_from_the_beginning(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    train_and_crash(job, job.inputs["model"], step=3)
    (job.checkpoints / "checkpoint-2" / "scheduler.pt").unlink()
    run.train(job, job.inputs["model"])
    other = make_job(tmp_path / "other", SFT)
    run.train(other, other.inputs["model"])
    assert differing(job.inputs["model"], other.inputs["model"]) == []


def test_a_save_cut_short_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, SFT)

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoints, "seal", no_space)
        run.train(job, job.inputs["model"])
    assert (job.checkpoints / "checkpoint-2" / "model.safetensors").exists()
    assert checkpoints.last_complete(job.checkpoints) is None
    run.train(job, job.inputs["model"])
    assert checkpoints.last_complete(job.checkpoints) == job.checkpoints / "checkpoint-6"


def test_keeps_as_many_checkpoints_as_asked(tmp_path: Path) -> None:
    job = make_job(tmp_path, {**SFT, "save_steps": 1, "keep_checkpoints": 3})
    run.train(job, job.inputs["model"])
    assert sorted(path.name for path in job.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    train_and_crash(job, job.inputs["model"], step=3)
    from safetensors.torch import load_file, save_file

    folder = job.checkpoints / "checkpoint-2"
    tensors = load_file(folder / "model.safetensors")
    moved = "model.layers.0.block_sparse_moe.experts.down_proj"
    tensors["elsewhere"] = tensors.pop(moved)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoints.seal(folder, 2, 1.0, 1, 1, 0)
    with pytest.raises(UserError, match=moved):
        run.train(job, job.inputs["model"])


def test_time_spent_before_the_crash_counts(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    train_and_crash(job, job.inputs["model"], step=3)
    earlier = checkpoints.read_manifest(job.checkpoints / "checkpoint-2")
    run.train(job, job.inputs["model"])
    totals = {record["name"]: record["value"] for record in read_metrics(job.metrics_path)}
    assert totals["train_seconds"] > earlier.seconds
    other = make_job(tmp_path / "other", SFT)
    run.train(other, other.inputs["model"])
    assert totals["train_tokens"] == {r["name"]: r["value"] for r in read_metrics(other.metrics_path)}["train_tokens"]
