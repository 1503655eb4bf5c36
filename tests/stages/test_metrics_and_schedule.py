"""metrics.jsonl and the learning-rate schedule."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.schema import OptimSection
from posttrain.stages.metrics import MetricsWriter, log_restart, read_metrics
from posttrain.stages.schedule import learning_rate


def optim(**fields: Any) -> OptimSection:
    return OptimSection.model_validate(fields)


def test_the_last_record_of_a_step_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, "sft")
    for value in (1.0, 2.0):
        writer.log(3, {"loss": value})
    writer.log(4, {"loss": 0.5, "learning_rate": 1e-3})
    MetricsWriter(path, "rl").log(3, {"loss": 9.0})
    found = [(r["stage"], r["step"], r["name"], r["value"]) for r in read_metrics(path)]
    assert found == [("sft", 3, "loss", 2.0), ("sft", 4, "loss", 0.5), ("sft", 4, "learning_rate", 1e-3), ("rl", 3, "loss", 9.0)]


def test_a_line_being_written_is_left_out_and_no_file_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    MetricsWriter(path, "sft").log(1, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 2, "sta')
    assert len(read_metrics(path)) == 1


def test_what_a_stage_logged_before_it_started_again_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sft, rl = MetricsWriter(path, "sft"), MetricsWriter(path, "rl")
    for step in (1, 2, 3):
        sft.log(step, {"loss": 4.0 - step})
    rl.log(1, {"reward": 0.5})
    log_restart(path, "sft")
    sft.log(1, {"loss": 9.0})
    assert [(r["stage"], r["step"], r["value"]) for r in read_metrics(path)] == [("rl", 1, 0.5), ("sft", 1, 9.0)]


def test_a_line_that_a_full_disk_cut_off_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, "sft")
    writer.log(1, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 2, "sta')
    writer.log(2, {"loss": 0.5})
    assert [(r["step"], r["value"]) for r in read_metrics(path)] == [(1, 1.0), (2, 0.5)]
    assert str(path) in caplog.text


def test_a_line_that_is_not_written_whole_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda handle, line: whole(handle, line[:10]))
    with pytest.raises(OSError, match="No space left"):
        MetricsWriter(tmp_path / "metrics.jsonl", "sft").log(1, {"loss": 1.0})


def test_what_is_not_finite_stays_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path, "sft").log(1, {"loss": float("nan")})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["value"] is None


def test_cosine_starts_at_the_top_after_warm_up_and_ends_at_the_minimum() -> None:
    section = optim(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(step, 20, section) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert learning_rate(25, 20, section) == pytest.approx(0.1)


def test_constant_stays() -> None:
    section = optim(learning_rate=2.0, schedule="constant", warmup_steps=1)
    assert [learning_rate(step, 9, section) for step in (0, 1, 8)] == [2.0, 2.0, 2.0]


def test_a_stage_of_one_step_has_a_rate() -> None:
    assert learning_rate(0, 1, optim(learning_rate=1.0)) == 1.0
