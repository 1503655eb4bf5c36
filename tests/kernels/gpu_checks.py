"""What is checked on a GPU, as functions: cases by name, each giving descriptions and errors. Needs no pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from posttrain.kernels.lightning.launch import NARROW, WIDE, forward
from tests.kernels.accuracy import Case, errors, layer_slopes, relative_rms, run_triton

LIMITS = {"out": 3e-3, "dq": 3e-3, "dk": 3e-3, "dv": 3e-3, "final": 2e-3, "initial_grad": 2e-3, "silu": 9e-4}
"""Relative RMS for bf16: rounding an output to bf16 alone gives 1.7e-3, the operands of the products as much again.

SiLU differs from torch's by roundings of fp32, 2^-22: they round one number in 2^14 the other way, by 2^-8 of it, to bf16.
So each of three tensors is wrong by 2^-15. An output that is wrong by d before it is rounded rounds the other way, by 2^-8,
with probability d / 2^-8: sqrt(3^0.5 2^-15 2^-8) = 4.5e-4. The limit is twice that.
"""
FIXED = (1, 2, 63, 64, 65, 127, 1000, 4095, 4096, 4097)
PACKED = (64, 0, 1, 700, 63, 65, 128, 2, 1000, 0)
Found = Iterator[tuple[str, dict[str, float]]]


def _bf16(lengths: tuple[int, ...], layer: int | None, heads: int = 4, **options: object) -> Case:
    return Case(lengths, layer_slopes(layer, heads), dtype=torch.bfloat16, head_dim=128, device="cuda", **options)  # type: ignore[arg-type]


def lengths() -> Found:
    """Fixed lengths about a chunk and beyond, first layer's slopes, heads few enough to be cut over time."""
    for length in FIXED:
        yield f"length {length}", errors(_bf16((length,), 0, packed=False))


def depths() -> Found:
    """Slopes of the first, a middle and the last lightning layer, and none at all."""
    for layer in (0, 40, 78, None):
        for heads in (4, 64):
            yield f"layer {layer}, {heads} heads", errors(_bf16((2048,), layer, heads))


def packed() -> Found:
    """Packed documents, with empty and short ones, with and without states, cut over time and not."""
    for states in (False, True):
        for per_part in (None, 1, 4, 1 << 20):
            case = _bf16(PACKED, 40, states=states, per_part=per_part)
            yield f"packed, states {states}, parts of {per_part}", errors(case)


def types() -> Found:
    """fp16, and fp32 in exact products, within the limits of bf16.

    fp16 numbers are rounded once more than bf16 ones, to bf16 operands of the states: their errors are taken over sqrt(2).
    """
    for dtype in (torch.float16, torch.float32):
        for head_dim in (16, 128):
            case = Case((200, 0, 65), layer_slopes(0, 4), dtype=dtype, head_dim=head_dim, device="cuda", states=True)
            rounding = 2**0.5 if dtype == torch.float16 else 1.0
            yield f"{dtype}, heads of {head_dim}", {name: error / rounding for name, error in errors(case).items()}


def configurations() -> Found:
    """Both configurations of bf16, with and without states, cut and not."""
    for setting in (NARROW, replace(NARROW, scores_first=False), WIDE):
        for states in (False, True):
            for per_part in (None, 2):
                case = _bf16((130, 0, 300, 64), 0, heads=3, setting=setting, states=states, per_part=per_part)
                yield f"{setting}, states {states}, parts of {per_part}", errors(case)


def steep() -> Found:
    """Slopes so steep that whole parts are left out, beside none."""
    for per_part in (1, 2, 4):
        case = Case(
            (1000,), [5.0, 0.5, 0.05, 0.0], dtype=torch.bfloat16, head_dim=128, device="cuda", states=True, per_part=per_part
        )
        yield f"parts of {per_part}", errors(case)


def silu() -> Found:
    """SiLU on load against SiLU in a pass before; both narrow and wide, cut and not."""
    for setting in (NARROW, WIDE):
        for per_part in (None, 4):
            case = _bf16((1000, 0, 65), 0, setting=setting, per_part=per_part, spread=2.0)
            data, documents = case.tensors(), case.documents()
            q, k, v = data["qkv"].chunk(3, dim=-1)
            found = forward(q, k, v, data["slopes"], documents, setting=setting, per_part=per_part, silu=True)
            q, k, v = torch.nn.functional.silu(data["qkv"]).chunk(3, dim=-1)
            expected = forward(q, k, v, data["slopes"], documents, setting=setting, per_part=per_part)
            yield f"{setting}, parts of {per_part}", {"silu": relative_rms(found, expected)}


CHECKS: dict[str, Callable[[], Found]] = {
    "lengths": lengths,
    "depths": depths,
    "packed": packed,
    "types": types,
    "configurations": configurations,
    "steep": steep,
    "silu": silu,
}


def repeated(times: int) -> bool:
    """Whether `times` runs give the same bits: cut and packed with states, narrow, wide."""
    cases = [_bf16(PACKED, 40, states=True), _bf16((2048,), 40, heads=64), _bf16((256,) * 6, 40, heads=64)]
    for case in cases:
        first = run_triton(case)
        for _ in range(times - 1):
            again = run_triton(case)
            if not all(torch.equal(x, again[name]) for name, x in first.items()):
                return False
    return True
