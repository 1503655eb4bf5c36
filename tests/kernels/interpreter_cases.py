"""The Triton kernels through Triton's interpreter; `test_triton.py` runs this file in a process with TRITON_INTERPRET=1.

The interpreter shows the arithmetic and the indexing. It does not show races, layouts, registers or speed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from triton import knobs

from posttrain.kernels.lightning import launch
from posttrain.kernels.lightning.chunked import lightning_decode_step
from posttrain.kernels.lightning.decode import decode
from posttrain.kernels.lightning.launch import Tile
from tests.kernels.accuracy import LENGTHS, Case, errors, layer_slopes, relative_rms

assert knobs.runtime.interpret, "run with TRITON_INTERPRET=1"
SMALL = Tile(chunk=32, block=8, warps=4, stages=2)


def bound(case: Case) -> float:
    """Relative RMS error to expect at most.

    A number is a sum of at most n = longest * head_dim + head_dim rounded products whose roundings cancel like a random walk:
    sqrt(n) 2^-24 of its size, times 4 for the decays, the scores and a sum that is itself small. What is rounded to a
    narrower type is then wrong by half its last place, 2^-11 for fp16; the interpreter cuts bf16 off instead of rounding it:
    2^-7.
    """
    n = (max(case.lengths) + 1) * case.head_dim
    last = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[case.dtype]
    return 4 * math.sqrt(n) * 2.0**-24 + last


def check(case: Case) -> None:
    found = errors(case)
    assert all(error <= bound(case) for error in found.values()), (bound(case), found)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("per_part", [None, 2])
def test_documents_on_all_sides_of_a_chunk(per_part: int | None, states: bool) -> None:
    check(Case(LENGTHS, layer_slopes(0, 1), states=states, setting=replace(SMALL, block=16), per_part=per_part))


@pytest.mark.parametrize("layer", [40, 78, None])
def test_slopes_of_all_depths(layer: int | None) -> None:
    check(Case((65,), layer_slopes(layer, 3), states=True, setting=SMALL, per_part=1))


@pytest.mark.parametrize("length", [0, 1, 65])
def test_documents_of_one_length(length: int) -> None:
    check(Case((length,) * 2, layer_slopes(0, 2), packed=False, states=True, setting=SMALL, per_part=1 if length == 65 else None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_in_the_configurations_in_use(dtype: torch.dtype) -> None:
    check(Case((65, 3), layer_slopes(0, 2), dtype=dtype, head_dim=64))


@pytest.mark.parametrize("per_part", [None, 1])
def test_a_pool_of_states_moves_on_in_its_slots_and_nowhere_else(per_part: int | None) -> None:
    case = Case((100, 0, 5, 33), layer_slopes(0, 2), states=True, setting=SMALL)
    data = case.tensors()
    q, k, v = data["qkv"].chunk(3, dim=-1)
    alone = torch.empty_like(data["initial"])
    start = data["initial"].clone()
    start[2] = 0
    expected = launch.forward(q, k, v, data["slopes"], case.documents(), initial=start, final=alone, setting=SMALL)
    pool = torch.full((6, *alone.shape[1:]), torch.nan)
    slots = torch.tensor([4, 1, -1, 0])
    pool[[4, 1, 0]] = data["initial"][[0, 1, 3]]
    out = launch.forward(
        *(q, k, v, data["slopes"], case.documents()), initial=pool, final=pool, slots=slots, setting=SMALL, per_part=per_part
    )
    assert relative_rms(out, expected) <= bound(case)
    assert relative_rms(pool[[4, 1, 0]], alone[[0, 1, 3]]) <= bound(case)
    assert pool[[2, 3, 5]].isnan().all()


def test_decoding_steps_and_padded_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 2, 32, generator=generator) for _ in range(3))
    slopes = torch.tensor(layer_slopes(0, 2))
    pool = torch.randn(5, 2, 32, 32, generator=generator)
    slots = torch.tensor([3, -1, 0, 4])
    states = pool[[3, 0, 4]]
    expected = lightning_decode_step(q[[0, 2, 3]], k[[0, 2, 3]], v[[0, 2, 3]], slopes, states)
    before = pool.clone()
    out = decode(q, k, v, slopes, pool, slots, block=16)
    # Two roundings a number of the state, a sum of 32 for an output.
    assert relative_rms(out[[0, 2, 3]], expected) <= 4 * math.sqrt(32) * 2.0**-24
    assert relative_rms(pool[[3, 0, 4]], states) <= 4 * 2.0**-24
    assert (out[1] == 0).all() and torch.equal(pool[[1, 2]], before[[1, 2]])
