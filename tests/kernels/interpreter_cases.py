"""The Triton kernels through Triton's interpreter; `test_triton.py` runs this file in a process with TRITON_INTERPRET=1.

The interpreter shows the arithmetic and the indexing. It does not show races, layouts, registers or speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


@pytest.mark.parametrize("per_part", [1, 2])
def test_what_has_decayed_to_zero_is_left_out_of_parts(per_part: int) -> None:
    """A chunk of 32 tokens at rate 5 leaves 2^-231: only the last chunk of a part, and the last part, can be felt."""
    check(Case((150, 33), [5.0, 1.5, 0.0], states=True, setting=SMALL, per_part=per_part))


@pytest.mark.parametrize(
    ("dtype", "states", "per_part"),
    [(torch.float32, False, None), (torch.float32, True, 1), (torch.float16, True, None), (torch.float16, False, 1)],
)
def test_silu_on_load_is_silu_before(dtype: torch.dtype, states: bool, per_part: int | None) -> None:
    case = Case((65, 0, 3), layer_slopes(0, 2), dtype=dtype, setting=SMALL, per_part=per_part, spread=2.0)
    data = case.tensors()
    initial = data["initial"] if states else None
    finals = [torch.full_like(data["initial"], torch.nan) for _ in range(2)]

    def run(qkv: torch.Tensor, silu: bool, final: torch.Tensor | None) -> torch.Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        rest = {"initial": initial, "final": final, "setting": SMALL, "per_part": per_part}
        return launch.forward(q, k, v, data["slopes"], case.documents(), silu=silu, **rest)  # type: ignore[arg-type]

    before = torch.nn.functional.silu(data["qkv"])
    for here, there in ((None, None), finals):
        assert relative_rms(run(data["qkv"], True, here), run(before, False, there)) <= bound(case)
    assert torch.equal(*finals)


@pytest.mark.parametrize("way", ["shifted", "transposed", "expanded"])
def test_inputs_that_descriptors_cannot_read_are_copied(way: str) -> None:
    case = Case((65, 3), layer_slopes(0, 2), setting=SMALL)
    q, k, v = (x.contiguous() for x in case.tensors()["qkv"].chunk(3, dim=-1))
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "shifted": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda x: x[:1].expand_as(x),
    }
    odd = views[way](k)
    found, expected = (
        launch.forward(q, x, v, case.tensors()["slopes"], case.documents(), setting=SMALL) for x in (odd, odd.contiguous())
    )
    assert torch.equal(found, expected)


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
