"""The Triton kernels without a GPU: through the interpreter, and what the compiler makes of them for sm_90.

Both run in a process of their own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a block may have on an H100

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(interpret: bool, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )


@pytest.mark.slow
def test_the_kernels_through_the_interpreter() -> None:
    options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly")
    done = run(True, "-m", "pytest", *options, "tests/kernels/interpreter_cases.py")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_without_spills() -> None:
    done = run(False, "-m", "tests.kernels.compile_gate", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    for name, figures in json.loads(done.stdout).items():
        assert figures["stack"] == 0, f"{name} spills {figures['stack']} bytes of registers: {figures}"
        assert figures["shared"] <= SHARED_LIMIT, f"{name} takes {figures['shared']} bytes of shared memory"
        if name != "decode":
            assert figures["wgmma"] > 0 and figures["mma_sync"] == 0, f"{name} multiplies by another path: {figures}"
            assert figures["bulk_copies"] > 0, f"{name} reads nothing through descriptors: {figures}"
            # What is read through pointers; the pre-pass reads nothing so.
            assert figures["async_copies_other"] == 0, f"{name} copies narrowly: {figures}"
            assert figures["async_copies_16"] > 0 or "parts" in name, f"{name} is not pipelined: {figures}"
