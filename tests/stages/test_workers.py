"""Several processes: gloo workers, ZeRO, and SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config.errors import UserError
from posttrain.model.loading import read_tensors
from posttrain.stages import checkpoints, run
from posttrain.stages.metrics import read_metrics
from tests.stages.crash import differing
from tests.stages.tasks import REWARD, RL, SFT, make_job

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def train(
    folder: Path,
    stage: dict[str, Any],
    *,
    workers: int = 1,
    zero_stage: int = 0,
    kill_at: int | None = None,
    dtype: str = "float32",
) -> None:
    """Train a stage in `workers` processes; with `kill_at` they kill themselves after that step."""
    resources: dict[str, Any] = {"num_workers": workers, "zero_stage": zero_stage}
    job = make_job(folder, stage, dtype=dtype, **resources)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [str(folder), json.dumps(stage), json.dumps({**resources, "dtype": dtype}), *([str(kill_at)] if kill_at else [])]
    processes = []
    for rank in range(workers):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers)}
        log = (folder / f"worker-{rank}.log").open("a")
        processes.append(subprocess.Popen([sys.executable, str(WORKER), *arguments], env=own, cwd=ROOT, stdout=log, stderr=log))
    codes = [process.wait(timeout=500) for process in processes]
    if kill_at:
        assert -signal.SIGKILL in codes and not job.inputs["model"].exists()
    else:
        assert codes == [0] * workers, (folder / "worker-0.log").read_text()[-3000:]


def curve(folder: Path, name: str = "loss") -> list[float]:
    return [record["value"] for record in read_metrics(folder / "metrics.jsonl") if record["name"] == name]


def alone(folder: Path, stage: dict[str, Any]) -> Path:
    """The stage trained by one worker, in this process."""
    job = make_job(folder, stage)
    run.train(job, job.inputs["model"])
    return folder


@pytest.mark.parametrize("stage", [SFT, RL], ids=["sft", "rl"])
def test_killed_and_started_again_ends_with_the_same_bits(tmp_path: Path, stage: dict[str, Any]) -> None:
    train(tmp_path / "whole", stage)
    train(tmp_path / "killed", stage, kill_at=3)
    train(tmp_path / "killed", stage)
    assert differing(tmp_path / "whole" / "model", tmp_path / "killed" / "model") == []


def test_killed_under_zero_2_with_two_workers_ends_with_the_same_bits(tmp_path: Path) -> None:
    train(tmp_path / "whole", SFT, workers=2, zero_stage=2)
    train(tmp_path / "killed", SFT, workers=2, zero_stage=2, kill_at=3)
    train(tmp_path / "killed", SFT, workers=2, zero_stage=2)
    assert differing(tmp_path / "whole" / "model", tmp_path / "killed" / "model") == []
    assert curve(tmp_path / "whole") == curve(tmp_path / "killed")


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_workers_have_the_loss_curve_of_one(tmp_path: Path, zero_stage: int) -> None:
    train(tmp_path / "two", SFT, workers=2, zero_stage=zero_stage)
    one = curve(alone(tmp_path / "one", SFT))
    assert len(one) == 6 and curve(tmp_path / "two") == pytest.approx(one, abs=1e-4)
    assert curve(tmp_path / "two", "grad_norm") == pytest.approx(curve(tmp_path / "one", "grad_norm"), rel=1e-3)
    assert one[-1] < one[0] - 0.1


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_under_zero_saves_router_gates_of_the_fp32_master_weights(tmp_path: Path, zero_stage: int) -> None:
    stage = {**SFT, "optim": {"learning_rate": 1e-4, "schedule": "constant"}}
    train(tmp_path, stage, workers=2, zero_stage=zero_stage, dtype="bfloat16")
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "model")
    assert set(before) == set(after)
    for name, tensor in after.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            assert tensor.dtype == before[name].dtype == torch.float32
            assert not tensor.equal(tensor.bfloat16().float()), "steps below a bf16 weight's last bit are kept"
            assert (tensor - before[name]).abs().max() < 5e-3
        else:
            assert tensor.dtype == torch.bfloat16
    one = curve(alone(tmp_path / "one", stage))
    assert curve(tmp_path) == pytest.approx(one, abs=0.02)


def test_a_group_of_one_trains_as_no_group_does_and_zero_2_on_it_too(tmp_path: Path) -> None:
    alone(tmp_path / "none", SFT)
    train(tmp_path / "one", SFT)
    assert differing(tmp_path / "none" / "model", tmp_path / "one" / "model") == []
    train(tmp_path / "zero", SFT, zero_stage=2)
    assert curve(tmp_path / "zero") == pytest.approx(curve(tmp_path / "none"), abs=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_online_rl_of_two_workers_is_that_of_one(tmp_path: Path, zero_stage: int) -> None:
    stage = {**RL, "kl_coef": 0.05, "pack_length": 64, "updates_per_step": 2}
    train(tmp_path / "two", stage, workers=2, zero_stage=zero_stage)
    alone(tmp_path / "one", stage)
    for name in ("loss", "reward", "grad_norm"):
        # Samples of later steps may part where a number falls between two tokens; the first two steps do not yet.
        assert curve(tmp_path / "two", name)[:2] == pytest.approx(curve(tmp_path / "one", name)[:2], rel=1e-3, abs=1e-5)
    assert len(curve(tmp_path / "two")) == 4


def test_the_reward_model_of_two_workers_is_that_of_one(tmp_path: Path) -> None:
    train(tmp_path / "two", REWARD, workers=2)
    one = curve(alone(tmp_path / "one", REWARD))
    assert curve(tmp_path / "two") == pytest.approx(one, abs=1e-4)


def test_a_checkpoint_of_other_resources_is_refused(tmp_path: Path) -> None:
    train(tmp_path, SFT, workers=2, zero_stage=2, kill_at=3)
    assert checkpoints.last_complete(tmp_path / "stages" / "stage" / "checkpoints") is not None
    job = make_job(tmp_path, SFT)
    with pytest.raises(UserError, match="written by 2 workers at ZeRO stage 2, this run has 1 at 0"):
        run.train(job, job.inputs["model"])
