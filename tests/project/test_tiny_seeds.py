"""The table of seeds, and what it promises."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.tiny_seeds import promises, table

STAGES = {"sft_short": 0.6, "reward": 0.85, "sft_long": 0.6, "dpo_short": 0.61, "dpo_long": 0.62, "rl": 0.8, "rl_shuffled": 0.1}


def report(**scores: float) -> dict[str, dict[str, Any]]:
    return {
        stage: {
            "stage": stage,
            "seconds": 10.4,
            "tokens_per_second": 1234.5,
            "heldout_accuracy": None if stage == "reward" else score,
            "pair_accuracy": score if stage == "reward" else None,
        }
        for stage, score in (STAGES | scores).items()
    }


def test_a_table_has_a_row_a_stage_and_a_column_a_seed() -> None:
    lines = table([report(), report(rl=0.9)], [0, 1])
    assert lines[0] == "| stage | seed 0 | seed 1 | mean | seconds | tokens/s |"
    assert lines[3] == "| reward (pairs) | 85.0 % | 85.0 % | 85.0 % | 10/10 | 1,234/1,234 |"
    assert "| rl | 80.0 % | 90.0 % | 85.0 % | 10/10 |" in lines[7]


@pytest.mark.parametrize(
    "scores",
    [{"sft_short": 0.49}, {"rl": 0.5}, {"dpo_short": 0.5}, {"dpo_long": 0.5}, {"reward": 0.79}, {"rl_shuffled": 0.65}],
    ids=lambda scores: next(iter(scores)),
)
def test_each_promise_can_break(scores: dict[str, float]) -> None:
    assert all(promises([report(), report()]).values())
    assert list(promises([report(), report(**scores)]).values()).count(False) >= 1
