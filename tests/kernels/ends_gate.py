"""Compiles the kernels of the ends for sm_90 without a GPU and prints, as JSON, what the compiler made of them.

    python -m tests.kernels.ends_gate

Run in a process of its own: Triton must have been imported without its interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from posttrain.kernels.lightning import gated_norm_kernels as norm
from tests.kernels.compile_gate import figures

WIDTHS = (1024, 8192)
FLOATS, NUMBERS, COUNTS = {"shares"}, {"eps"}, {"x_t", "gate_t", "dy_t"}


def compiled(kernel: Any, warps: int, constants: dict[str, int]) -> Any:
    """The kernel for bf16, with pointers and strides that are multiples of 16, as real tensors have them."""
    signature, attrs = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in NUMBERS:
            signature[name] = "fp32"
        elif name == "rows":
            signature[name] = "i32"
        else:
            signature[name] = "i32" if name in COUNTS else "*fp32" if name in FLOATS else "*bf16"
            attrs[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def forward(width: int) -> Any:
    """The gated norm of rows of `width`."""
    return compiled(norm.gated_norm_kernel, norm._warps(width, norm.FORWARD_SHARE), {"WIDTH": width, "BLOCK": width})


def backward(width: int) -> Any:
    """Its gradient."""
    warps = norm._warps(width, norm.BACKWARD_SHARE)
    return compiled(norm.gated_norm_backward_kernel, warps, {"WIDTH": width, "BLOCK": width, "STAGES": norm._stages(width, 6)})


def cases() -> dict[str, Callable[[], Any]]:
    """The kernels by name."""
    made: dict[str, Callable[[], Any]] = {}
    for width in WIDTHS:
        made[f"norm {width}"] = partial(forward, width)
        made[f"norm backward {width}"] = partial(backward, width)
    return made


def wide_accesses(made: Any) -> dict[str, int]:
    """Loads and stores of 16 bytes, asynchronous copies of 16 bytes, and all that are narrower."""
    lines = [line for line in made.asm["ptx"].splitlines() if "ld.global" in line or "st.global" in line or "cp.async." in line]
    lines = [line for line in lines if "commit" not in line and "wait" not in line]
    wide = sum(".v4.b32" in line or "v4.f32" in line or ", 0x10" in line for line in lines)
    return {"wide": wide, "narrow": len(lines) - wide}


if __name__ == "__main__":
    found = {}
    for name, make in cases().items():
        kernel = make()
        found[name] = figures(kernel) | wide_accesses(kernel)
    print(json.dumps(found, indent=1))
