"""The check that CI makes on the tiny run sees a run that stopped half-way."""

from __future__ import annotations

from typing import Any

from scripts.check_tiny import faults

DONE: list[dict[str, Any]] = [
    {"stage": "base", "seconds": 2.0, "tokens_per_second": None, "heldout_accuracy": 0.0},
    {"stage": "sft", "seconds": 60.0, "tokens_per_second": 9000.0, "heldout_accuracy": 0.6},
]


def test_a_complete_run_has_no_faults() -> None:
    assert faults(DONE, ["base", "sft"]) == []


def test_a_reward_model_is_scored_on_pairs() -> None:
    row = {"stage": "reward", "seconds": 9.0, "heldout_accuracy": None, "pair_accuracy": 0.9}
    assert faults([*DONE, row], ["reward"]) == []


def test_a_missing_stage_is_named() -> None:
    assert faults(DONE, ["base", "sft", "rl"]) == ["rl: not in the report"]


def test_a_stage_without_result_is_named() -> None:
    rows = [DONE[0], {**DONE[1], "seconds": None, "heldout_accuracy": None}]
    assert faults(rows, ["base", "sft"]) == ["sft: no time, so it did not run", "sft: no held-out accuracy"]
