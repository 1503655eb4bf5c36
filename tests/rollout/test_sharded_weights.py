"""Two ranks of ZeRO-3 on the CPU: the weights that arrive are the gathered ones, bit for bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.model.loading import read_tensors
from posttrain.model.naming import Scheme, pieces
from posttrain.rollout.weights.manifest import checkpoint_shapes
from posttrain.rollout.weights.store import StoredWeights
from tests.stages.tasks import SFT, make_job

WORKER = Path(__file__).with_name("zero3_worker.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("scheme", "dtype"), [("posttrain", "float32"), ("official", "bfloat16")])
def test_weights_of_two_ranks_of_zero_3_arrive_as_gathered(tmp_path: Path, scheme: Scheme, dtype: str) -> None:
    resources: dict[str, Any] = {"num_workers": 2, "zero_stage": 3, "dtype": dtype}
    stage = {**SFT, "steps": 3}
    make_job(tmp_path, stage, **resources)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(WORKER), str(tmp_path), json.dumps(stage), json.dumps(resources), scheme]
    processes = []
    for rank in range(2):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        log = (tmp_path / f"worker-{rank}.log").open("w")
        processes.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=log, stderr=log))
    codes = [process.wait(timeout=500) for process in processes]  # the first start compiles an extension of DeepSpeed's
    assert codes == [0, 0], (tmp_path / "worker-0.log").read_text()[-3000:]
    for rank in range(2):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == {"wrong": [], "version": 9}

    stored = StoredWeights.open(**json.loads((tmp_path / "published.json").read_text()))
    received = {name: tensor for group in stored.groups() for name, tensor in group}
    stored.verify(checkpoint_shapes(json.loads((tmp_path / "model" / "config.json").read_text()), list(received)))
    assert stored.version == 3
    # The model that the trainer saved at its end took another way: DeepSpeed's own gather of a whole state dict.
    saved = read_tensors(tmp_path / "model")
    base = read_tensors(tmp_path / "base")
    assert not saved["lm_head.weight"].equal(base["lm_head.weight"])
    expected = pieces({name: tuple(tensor.shape) for name, tensor in saved.items()}, scheme)
    assert [piece.name for piece in expected] == [*received] or {piece.name for piece in expected} == {*received}
    for piece in expected:
        whole = saved[piece.target]
        if dtype == "bfloat16":
            whole = whole.bfloat16()  # gates are saved from the fp32 master weights; what the forward pass reads is sent
        part = whole.reshape(-1)[piece.start :][: received[piece.name].numel()].view(piece.shape)
        assert received[piece.name].dtype == part.dtype == getattr(torch, dtype) and received[piece.name].equal(part), piece.name
