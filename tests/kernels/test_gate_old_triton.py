"""The gates of the compiler's work once more, under the oldest Triton that the kernels must run on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "3.6.0"
"""What torch 2.11 with CUDA brings, and so what a machine with a GPU has."""
GATES = 3  # compile_gate, ends_gate, serving_gate


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which Python finds that Triton first."""
    folder = tmp_path_factory.mktemp("triton")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"triton=={OLDEST}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        pytest.fail(f"pip cannot install triton {OLDEST}, which this test needs: {' '.join(done.stderr.split())[-400:]}")
    return {**os.environ, "PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kernels_compile_for_hopper_under_the_oldest_triton(environment: dict[str, str]) -> None:
    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=840
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        return done.stdout

    assert python("-c", "import triton; print(triton.__version__)").strip() == OLDEST
    options = ("-q", "-m", "", "-p", "no:cacheprovider", "--noconftest", "-k", "compile_for_hopper and not oldest")
    told = python("-m", "pytest", *options, "tests/kernels")
    assert f"{GATES} passed" in told, told[-2000:]
