"""Converting needs memory for a piece of a tensor, loading for the model and a piece of a tensor, whatever the files' size."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.naming import expected_shapes, pieces
from posttrain.model.tensor_files import Entry, plan_shards, read_folder, write_file, write_index

WORKER = Path(__file__).with_name("memory_worker.py")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not stay after the test: pytest would keep gigabytes of the last three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_large(folder: Path, layers: int) -> int:
    """An official checkpoint of about 250 MB a layer, in files of 500 MB; returns the bytes of its tensors."""
    config = MiniMaxText01Config(
        vocab_size=4096,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        rotary_dim=64,
        intermediate_size=2304,
        num_local_experts=16,
        dtype="bfloat16",
    )
    folder.mkdir()
    shapes = expected_shapes(config.to_dict())
    assert shapes is not None
    dtypes = {True: "F32", False: "BF16"}
    wanted = pieces(shapes, "official")
    entries = [Entry(piece.name, dtypes[piece.name.endswith("gate.weight")], piece.shape) for piece in wanted]
    draw = random.Random(0)

    def data(entry: Entry) -> Iterator[bytes]:
        for begin in range(0, entry.nbytes, 2**22):
            yield draw.randbytes(min(2**22, entry.nbytes - begin))

    shards = plan_shards(entries, 500_000_000)
    for file, own in shards.items():
        write_file(folder / file, own, data)
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(config.to_official()))
    return sum(entry.nbytes for entry in entries)


def measure(*arguments: str) -> tuple[float, float]:
    """MiB of anonymous memory before the action and at its peak."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, str(WORKER), *arguments], env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    before, peak = map(float, output.split()[-2:])
    return before, peak


def test_two_gigabytes_are_converted_in_less_than_one(large: Path) -> None:
    size = write_large(large / "source", layers=9)
    assert size > 2e9
    before, peak = measure("convert", str(large / "source"), str(large / "ours"), "posttrain")
    print(f"before {before:.0f} MiB, peak {peak:.0f} MiB")
    assert peak < 1e9 / 2**20
    assert peak - before < 100  # a buffer of 16 MiB, headers, and what the allocator keeps
    source, ours = read_folder(large / "source"), read_folder(large / "ours")
    assert sum(stored.nbytes for stored in ours.values()) == size
    w3, own = "model.layers.5.block_sparse_moe.experts.7.w3.weight", "model.layers.5.block_sparse_moe.experts.gate_up_proj"
    with safe_open(source[w3].file, "pt") as first, safe_open(ours[own].file, "pt") as second:
        rows = first.get_tensor(w3)
        assert rows.view(torch.int16).equal(second.get_slice(own)[7, 2304:].view(torch.int16))


def test_loading_takes_the_models_memory_and_little_more(large: Path) -> None:
    size = write_large(large / "source", layers=3)
    before, peak = measure("load", str(large / "source"))
    print(f"model {size / 2**20:.0f} MiB, before {before:.0f} MiB, peak {peak:.0f} MiB")
    assert peak - before < size / 2**20 + 100
