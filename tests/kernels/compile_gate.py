"""Compiles the kernels for sm_90 without a GPU and prints, as JSON, what the compiler made of them.

    python -m tests.kernels.compile_gate [THREADS [WORD ...]]

with WORDs only the kernels in whose name all of them are.

Run in a process of its own: Triton must have been imported without its interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from posttrain.kernels.lightning.decode import BLOCK, WARPS, decode_kernel
from posttrain.kernels.lightning.launch import NARROW, PART, WIDE, Tile
from posttrain.kernels.lightning.walk import part_kernel, walk_kernel

FLOATS = {"slopes", "initial", "final_grad", "parts", "final", "pool"}
INTEGERS = {"cu_seqlens", "slots"}
COUNTS = {"heads", "documents", "length", "chunks_per_part", "items"}
STRIDE = re.compile(r"_[thb]$")
FORWARD_ABSENT = ("do", "dq", "dk", "dv", "final_grad")


def compiled(kernel: Any, warps: int, constants: dict[str, Any], dtype: str = "bf16") -> Any:
    """The kernel with pointers and strides that are multiples of 16, as real tensors have them."""
    signature, constexprs, attrs = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
            continue
        if name in COUNTS:
            signature[name] = "i32"
            continue
        signature[name] = (
            "i32" if STRIDE.search(name) else f"*{'fp32' if name in FLOATS else 'i32' if name in INTEGERS else dtype}"
        )
        attrs[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def figures(made: Any) -> dict[str, int]:
    """Registers, bytes of stack (spills), shared memory, and counts of the instructions that matter."""
    ptx = made.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared": made.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma_sync": ptx.count("mma.sync"),
        "bulk_copies": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", ptx)),
        "async_copies_16": len(re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]+\], \[[^\]]+\], 0x10", ptx)),
        "async_copies_other": len(re.findall(r"cp\.async\.ca", ptx)),
    }


def walk(
    backward: bool,
    setting: Tile,
    split: bool = False,
    bound: bool = False,
    final: bool = False,
    silu: bool = False,
    packed: bool = True,
    slots: bool = False,
) -> Any:
    """A walk in bf16 at 128 numbers a head, from states where `bound` and to a state where `final`."""
    constants = _shared(backward, bound, silu, setting, walk_kernel)
    scores_first = silu or (setting.scores_first and not final)
    constants |= {"SPLIT": split, "FINAL": final, "SCORES_FIRST": scores_first, "SCORE": tl.bfloat16}
    constants |= {"PACKED": packed, "SLOTS": slots}
    absent = {"out"} if backward else set(FORWARD_ABSENT)
    wanted = {"parts": split, "initial": bound, "final_grad": bound, "final": final, "cu_seqlens": packed, "slots": slots}
    absent |= {name for name, there in wanted.items() if not there}
    return compiled(walk_kernel, setting.warps, constants | dict.fromkeys(absent))


def part(backward: bool, setting: Tile, bound: bool = False, silu: bool = False) -> Any:
    """The pre-pass of a cut walk."""
    constants = _shared(backward, bound, silu, setting, part_kernel)
    absent = {"slots"} | (set() if bound else {"initial", "final_grad"}) | (set() if backward else {"do", "final_grad"})
    return compiled(part_kernel, setting.warps, constants | dict.fromkeys(absent))


def decode() -> Any:
    """One decoding step with slots, of what comes before SiLU."""
    return compiled(decode_kernel, WARPS, {"D": 128, "BLOCK": BLOCK, "SLOTS": True, "SILU": True})


def _shared(backward: bool, bound: bool, silu: bool, setting: Tile, kernel: Any) -> dict[str, Any]:
    strides = {
        name: 0 for name in kernel.arg_names if STRIDE.search(name) and name[:-2] in (("out",) if backward else FORWARD_ABSENT)
    }
    return strides | {
        "D": 128,
        "BLOCK": setting.block,
        "CHUNK": setting.chunk,
        "STAGES": setting.stages,
        "BACKWARD": backward,
        "PACKED": True,
        "WIDTH": 64,
        "BOUND": bound,
        "SLOTS": False,
        "SILU": silu,
        "OPERAND": tl.bfloat16,
        "PRECISION": "tf32",
    }


def cases() -> dict[str, Callable[[], Any]]:
    """The kernels that `launch` makes for packed bf16 documents with heads of 128, by name."""
    made: dict[str, Callable[[], Any]] = {"decode": decode}
    for backward in (False, True):
        way = "backward" if backward else "forward"
        made[f"{way} parts"] = partial(part, backward, PART)
        made[f"{way} parts from states"] = partial(part, backward, PART, bound=True)
        for kind, setting in (("narrow", NARROW), ("wide", WIDE)):
            made[f"{way} {kind} of one length"] = partial(walk, backward, setting, packed=False)
            if not backward:
                made[f"{way} {kind} with slots"] = partial(walk, False, setting, bound=True, final=True, slots=True)
            for cut in (False, True):
                name = f"{way} {kind}{' cut' if cut else ''}"
                made[name] = partial(walk, backward, setting, cut)
                made[f"{name} from states"] = partial(walk, backward, setting, cut, bound=True)
                made[f"{name} to states"] = partial(walk, backward, setting, cut, final=True)
                made[f"{name} with states"] = partial(walk, backward, setting, cut, bound=True, final=True)
                if not backward:
                    made[f"{name} of SiLU"] = partial(walk, False, setting, cut, silu=True)
                    made[f"{name} from states of SiLU"] = partial(walk, False, setting, cut, bound=True, silu=True)
    made["forward parts of SiLU"] = partial(part, False, PART, silu=True)
    return made


if __name__ == "__main__":
    with ThreadPoolExecutor(int(sys.argv[1]) if len(sys.argv) > 1 else 1) as pool:
        made = {name: make for name, make in cases().items() if all(word in name.split() for word in sys.argv[2:])}
        print(json.dumps(dict(zip(made, pool.map(lambda make: figures(make()), made.values()), strict=True)), indent=1))
