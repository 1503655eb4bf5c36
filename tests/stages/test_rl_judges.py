"""Online RL with a judge that is slow, down or talks nonsense: it goes on by the configured rule, never on a made-up number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.stages import run
from posttrain.stages.metrics import read_metrics
from tests.reward.judges.judge_server import Asked, Handler, line, serving
from tests.stages.tasks import RL, make_job

SAMPLES = 16
"""Of a step: four prompts, four answers each."""


def fifth(handler: Handler, asked: Asked) -> None:
    handler.say(line(asked, grade=5))


def down(handler: Handler, asked: Asked) -> None:
    handler.send(b"", status=500)


def nonsense(handler: Handler, asked: Asked) -> None:
    handler.say("Grade: 1000000. " + line(asked, grade=1_000_000))


def slow(handler: Handler, asked: Asked) -> None:
    handler.hang()


def metrics_with(tmp_path: Path, respond: Callable[[Handler, Asked], None], rule: str) -> dict[str, list[float]]:
    """Two steps with a judge of truthfulness, for which the learned level has no head."""
    with serving(respond) as server:
        judge = {"kind": "consistency", "dimension": "truthfulness", "url": server.url, "model": "small", "retries": 0}
        judge |= {"timeout_seconds": 0.3, "batch_timeout_seconds": 2.0}
        reward: dict[str, Any] = {**RL["reward"], "judges": {"facts": judge}, "no_verdict": rule}
        job = make_job(tmp_path, {**RL, "reward": reward, "steps": 2})
        run.train(job, job.inputs["model"])
    found: dict[str, list[float]] = {}
    for record in read_metrics(job.metrics_path):
        found.setdefault(record["name"], []).append(record["value"])
    assert (job.inputs["model"] / "model.safetensors").is_file()
    return found


@pytest.mark.parametrize("respond", [down, nonsense, slow], ids=lambda respond: respond.__name__)
def test_answers_without_a_verdict_are_dropped_and_counted(tmp_path: Path, respond: Callable[[Handler, Asked], None]) -> None:
    found = metrics_with(tmp_path, respond, "drop")
    assert found["dropped"] == [SAMPLES] * 2
    assert found["grad_norm"] == [0.0] * 2, "nothing is learned from them"


@pytest.mark.parametrize("rule", ["learned", "zero"])
def test_a_lost_judge_counts_nothing_where_no_head_speaks_in_its_place(tmp_path: Path, rule: str) -> None:
    given = metrics_with(tmp_path / "given", fifth, rule)
    lost = metrics_with(tmp_path / "lost", nonsense, rule)
    assert given["dropped"] == lost["dropped"] == [0.0, 0.0]
    # Correctness (learned) and truthfulness (judged) weigh the same: (q + 1) / 2 with full marks, q / 2 without a verdict.
    with_marks, without = (found["reward/rest"][0] / RL["reward"]["learned_weight"] for found in (given, lost))
    assert with_marks - without == pytest.approx(0.5, abs=1e-9)
