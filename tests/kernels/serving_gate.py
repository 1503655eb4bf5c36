"""Compiles the kernels of serving for sm_90 without a GPU and prints, as JSON, what the compiler made of them.

python -m tests.kernels.serving_gate [THREADS]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import triton.language as tl

from posttrain.kernels.lightning import verify
from posttrain.kernels.lightning.mixed import CHUNKS, DECODING, PREFILLING, mixed_kernel
from tests.kernels import compile_gate

compile_gate.INTEGERS.add("accepted")
compile_gate.COUNTS.update({"prefills", "decodes"})
REGISTERS = 65536  # of a processor


def mixed(chunk: int) -> dict[str, int]:
    """A step with prefills of at most `chunk` tokens, or without prefills for 0; bf16, heads of 128."""
    setting = PREFILLING if chunk else DECODING
    constants: dict[str, Any] = {"D": 128, "BLOCK": setting.block, "CHUNK": chunk or CHUNKS[0]}
    constants |= {"PREFILL": chunk > 0, "SCORE": tl.bfloat16, "OPERAND": tl.bfloat16, "PRECISION": "tf32"}
    if not chunk:
        constants["cu_seqlens"] = None
    return _figures(mixed_kernel, setting.warps, constants, programs=2 if chunk else 8)


def verification(drafts: int, dtype: str = "bf16") -> dict[str, int]:
    """A verification of `drafts` tokens with as many pending; heads of 128."""
    split = dtype == "bf16"
    constants = {"D": 128, "BLOCK": verify.BLOCK, "DRAFTS": drafts, "PENDING": drafts, "SLOTS": True, "SPLIT": split}
    warps = verify.WARPS if split else verify.WARPS_IN_FP32
    return _figures(verify.verify_kernel, warps, constants, programs=6 if split else 1, dtype=dtype)


def _figures(kernel: Any, warps: int, constants: dict[str, Any], programs: int, dtype: str = "bf16") -> dict[str, int]:
    """`compile_gate.figures`, and the registers of a thread with which `programs` share a processor."""
    found = compile_gate.figures(compile_gate.compiled(kernel, warps, constants, dtype))
    return {**found, "register_limit": REGISTERS // (programs * warps * 32)}


CASES: dict[str, Callable[[], dict[str, int]]] = {
    "decodes": partial(mixed, 0),
    **{f"mixed {chunk}": partial(mixed, chunk) for chunk in CHUNKS},
    **{f"verification of {drafts}": partial(verification, drafts) for drafts in (4, 8)},
    "fp32 verification of 8": partial(verification, 8, "fp32"),
    "fp16 verification of 8": partial(verification, 8, "fp16"),
}

if __name__ == "__main__":
    with ThreadPoolExecutor(int(sys.argv[1]) if len(sys.argv) > 1 else 1) as pool:
        print(json.dumps(dict(zip(CASES, pool.map(lambda make: make(), CASES.values()), strict=True)), indent=1))
