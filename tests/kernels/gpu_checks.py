"""What is checked on a GPU, as functions: cases by name, each giving descriptions and errors. Needs no pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from posttrain.kernels.lightning.launch import NARROW, WIDE
from tests.kernels.accuracy import Case, errors, layer_slopes, run_triton

LIMITS = {"out": 3e-3, "dq": 3e-3, "dk": 3e-3, "dv": 3e-3, "final": 2e-3, "initial_grad": 2e-3}
"""Relative RMS for bf16: rounding an output to bf16 alone gives 1.7e-3, the operands of the products as much again."""
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
    for setting in (NARROW, replace(NARROW, late=True), WIDE):
        for states in (False, True):
            for per_part in (None, 2):
                case = _bf16((130, 0, 300, 64), 0, heads=3, setting=setting, states=states, per_part=per_part)
                yield f"{setting}, states {states}, parts of {per_part}", errors(case)


CHECKS: dict[str, Callable[[], Found]] = {
    "lengths": lengths,
    "depths": depths,
    "packed": packed,
    "types": types,
    "configurations": configurations,
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
