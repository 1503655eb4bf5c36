"""Loading straight onto ranks: the weights are the checkpoint's, and a rank reads only what it holds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config.errors import UserError
from posttrain.model.convert import convert
from posttrain.model.loading import load_causal_lm
from posttrain.model.naming import SCHEMES, Scheme
from posttrain.model.sharded_loading import load_partitioned
from tests.model.schemes import same_bits, stored_tensors, write_official
from tests.model.small import small_model

WORKER = Path(__file__).with_name("partition_worker.py")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return write_official(tmp_path / "source")


def launch(folder: Path, result: Path, dtype: str, ranks: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(ranks):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        log = (result.parent / f"worker-{rank}.log").open("w")
        command = [sys.executable, str(WORKER), str(folder), str(result), dtype]
        processes.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=log, stderr=log))
    codes = [process.wait(timeout=500) for process in processes]  # the first start compiles an extension of DeepSpeed's
    assert codes == [0] * ranks, (result.parent / "worker-0.log").read_text()[-3000:]
    return [json.loads(Path(f"{result}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("scheme", "dtype", "ranks"),
    [("official", "float32", 2), ("native", "bfloat16", 2), ("posttrain", "float32", 3), ("posttrain", "float32", 1)],
)
def test_ranks_of_zero_3_read_their_shares(scheme: Scheme, dtype: str, ranks: int, official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "kind", scheme, shard_bytes=20_000)
    own = load_causal_lm(official).state_dict()
    torch.save(own, tmp_path / "kind" / "expected.pt")
    results = launch(tmp_path / "kind", tmp_path / "result", dtype, ranks)
    stored = stored_tensors(tmp_path / "kind")
    total = sum(tensor.nbytes for tensor in stored.values())
    for result in results:
        assert result["wrong"] == [] and "is gathered" in result["refused"]
        # A rank's share of a parameter is rounded up to whole elements.
        assert total / ranks - len(own) * 4 * ranks <= result["read"] <= total / ranks + len(own) * 4
    assert sum(result["read"] for result in results) == total


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_whole_model_is_read_whole(scheme: Scheme, official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "kind", scheme)
    model = small_model(seed=7, rotary_dim=8)
    read = load_partitioned(model, tmp_path / "kind")
    assert read == sum(tensor.nbytes for tensor in stored_tensors(tmp_path / "kind").values())
    assert same_bits(model.state_dict(), load_causal_lm(official).float().state_dict())


class Status:
    """DeepSpeed's state of a parameter that is not gathered."""

    name = "NOT_AVAILABLE"


@pytest.mark.parametrize("ranks", [2, 3, 7, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shares_of_any_number_of_ranks_join_to_the_whole(scheme: Scheme, ranks: int, official: Path, tmp_path: Path) -> None:
    """Partitions as DeepSpeed cuts them: equal runs of the flat parameter, the last ones short or empty, padded with zeros."""
    convert(official, tmp_path / "kind", scheme)
    expected = load_causal_lm(official).state_dict()
    joined: dict[str, list[torch.Tensor]] = {name: [] for name in expected}
    read = 0
    for rank in range(ranks):
        model = small_model(rotary_dim=8)
        for parameter in model.parameters():
            partition = torch.full((-(-parameter.numel() // ranks),), torch.nan)
            partition.ds_numel, partition.final_location = partition.numel(), None  # type: ignore[attr-defined]
            parameter.ds_tensor, parameter.ds_shape = partition, parameter.shape
            parameter.ds_zero_partition_rank, parameter.ds_status = rank, Status()
            parameter.data = torch.empty(0)
        read += load_partitioned(model, tmp_path / "kind")
        for name, parameter in model.named_parameters():
            joined[name].append(parameter.ds_tensor)
    for name, tensor in expected.items():
        whole = torch.cat(joined[name])
        assert whole[: tensor.numel()].equal(tensor.float().flatten()) and not whole[tensor.numel() :].any(), name
    assert read == sum(prod(tensor.shape) * tensor.itemsize for tensor in stored_tensors(tmp_path / "kind").values())


def test_what_does_not_fit_is_named_and_changes_nothing(official: Path) -> None:
    model = small_model(rotary_dim=8, vocab_size=40)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"model.embed_tokens.weight is \[41, 32\], expected \[40, 32\]"):
        load_partitioned(model, official)
    assert same_bits(before, model.state_dict())
