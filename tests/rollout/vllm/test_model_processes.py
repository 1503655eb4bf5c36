"""The plugin where vLLM's workers are processes of their own: from an installed wheel, and with tensor parallelism."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.project.test_tree import MADE
from tests.rollout.vllm import tiny
from tests.rollout.vllm.test_model import assert_agrees

pytestmark = [tiny.needs_vllm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("answer.py")
START_SECONDS = 280


def answers_of(folder: Path, asked: list[list[int]], where: Path, path: str = "", **changes: Any) -> tuple[str, list[Any]]:
    """Start a program with an engine; where its plugin comes from, and its answers.

    Args:
        where: an empty folder to run in, which is no checkout.
        path: put before the environment's own packages.
    """
    given = {"arguments": tiny.engine_arguments(folder, **changes), "prompts": asked, "tokens": 6}
    environment = {**os.environ, **tiny.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": path}
    where.mkdir()
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(where / "answers.json")],
        input=json.dumps(given),
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((where / "answers.json").read_text())
    return found["package"], [tuple(answer) for answer in found["answers"]]


def test_from_a_wheel_in_spawned_workers(tmp_path: Path) -> None:
    """What is installed is all that the workers see; the checkout is on no path of theirs."""
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*MADE, "*.egg-info"))
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("posttrain-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    model = tiny.write_tiny(tmp_path / "tiny", scheme="official")
    asked = tiny.mixed_prompts(16, 200)
    package, answers = answers_of(tmp_path / "tiny", asked, tmp_path / "empty", str(site))
    assert Path(package) == site / "posttrain/rollout/vllm/plugin.py"
    assert_agrees(model, asked, answers)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 1, "vocab_size": 61, "attn_type_list": [1, 0, 0]}],
    ids=["even", "one head for keys, odd vocabulary"],
)
def test_tensor_parallel(changes: dict[str, Any], tmp_path: Path) -> None:
    """Two ranks share heads, states, inner norm, experts and vocabulary; chunks of 64 tokens, decodes beside them."""
    model = tiny.write_tiny(tmp_path / "tiny", **changes)
    asked = tiny.mixed_prompts(16, 200, vocab_size=changes.get("vocab_size", 97))
    _, answers = answers_of(tmp_path / "tiny", asked, tmp_path / "empty", tensor_parallel_size=2, max_num_batched_tokens=64)
    assert_agrees(model, asked, answers)
