"""Numbers of a reward model's evaluation, against what is counted by hand."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.config.schema import RewardStage
from posttrain.data.formats import normalise
from posttrain.reward.guards.calibration import calibrate
from posttrain.reward.heads import HeadScore
from posttrain.stages import reward_trainer
from posttrain.stages.reward_evaluation import GradeRow, PairRow, difficulty_section, leakage, rank_pairs, summary
from posttrain.stages.reward_trainer import HeldoutAccuracy
from tests.stages.reward_tasks import STAGE

TARGETS = ("correctness", "helpfulness", "depth")


def row(
    leads: tuple[float, float, float],
    margins: dict[str, float] | None,
    bucket: str = "bridging",
    lengths: tuple[int, int] = (4, 3),
) -> PairRow:
    """A pair whose better answer leads by so much in each target."""
    record = normalise({"prompt": "p", "chosen": "good", "rejected": "bad"} | ({"margins": margins} if margins else {}))
    chosen = {target: HeadScore(1.0 + lead, 0.5) for target, lead in zip(TARGETS, leads, strict=True)}
    rejected = {target: HeadScore(1.0, 0.25) for target in TARGETS}
    return PairRow({**record, "source": "s", "pair_kind": "single:depth"}, 0.5, bucket, chosen, rejected, lengths)


ROWS = [
    row((2.0, 0.5, 0.0), {"correctness": 1.0, "helpfulness": 0.0, "depth": 0.0}),
    row((-1.0, -0.5, 0.0), {"correctness": 0.5, "helpfulness": 0.0, "depth": 0.0}, "near_tie", (3, 5)),
    row((0.0, 1.0, -2.0), {"correctness": 0.0, "helpfulness": 0.25, "depth": 1.0}, "near_tie", (6, 2)),
    row((1.0, 3.0, 1.0), {"correctness": 1.0, "helpfulness": 1.0}),
    row((0.0, 9.0, 9.0), None, "contrastive"),
    row((0.25, 0.0, 0.0), {"correctness": 0.0, "helpfulness": 0.0}),
]


def test_accuracies_are_those_counted_by_hand() -> None:
    accuracy = summary(ROWS, [])["pair_accuracy"]
    # Preferences: 2, -1, (1 - 2) / 2, (1 + 3) / 2, 0 (half right); the last pair is a tie and is left out.
    assert accuracy["all"] == 2.5 / 5
    assert accuracy["by_bucket"] == {
        "bridging": {"accuracy": 1.0, "count": 2},
        "contrastive": {"accuracy": 0.5, "count": 1},
        "near_tie": {"accuracy": 0.0, "count": 2},
    }
    assert accuracy["by_target"] == {
        "correctness": {"accuracy": 2.5 / 4, "count": 4},
        "helpfulness": {"accuracy": 1.0, "count": 2},
        "depth": {"accuracy": 0.0, "count": 1},
    }


def test_ties_and_leakage_are_those_counted_by_hand() -> None:
    assert summary(ROWS, [])["ties"] == {
        "correctness": {"mean_lead": 0.125, "count": 2},
        "helpfulness": {"mean_lead": pytest.approx(1 / 3), "count": 3},
        "depth": {"mean_lead": 0.0, "count": 2},
    }
    matrix = leakage(ROWS)
    # Two pairs differ in correctness alone; the third in depth alone, which makes helpfulness differ with it.
    assert matrix["correctness"] == {
        "correctness": {"share": 0.5, "mean_lead": 0.5, "count": 2},
        "helpfulness": {"share": 0.5, "mean_lead": 0.0, "count": 2},
        "depth": {"share": 0.5, "mean_lead": 0.0, "count": 2},
    }
    assert matrix["depth"] == {
        "correctness": {"share": 0.5, "mean_lead": 0.0, "count": 1},
        "helpfulness": {"share": 1.0, "mean_lead": 1.0, "count": 1},
        "depth": {"share": 0.0, "mean_lead": -2.0, "count": 1},
    }
    assert matrix["helpfulness"] == matrix["depth"] and set(matrix) == {"correctness", "helpfulness", "depth"}
    assert leakage([row((1.0, 1.0, 1.0), {"correctness": 1.0, "helpfulness": 0.0})]) == {}, "it may differ in depth as well"


def test_the_head_of_correctness_is_compared_with_the_verifier() -> None:
    """Right answers score 1.5 and 1.25, wrong ones 1.0 each, but for the answer of the second prompt that scores 2.0."""

    def verified(prompt: str, chosen: str, rejected: str, lead: float, wrong: float = 1.0) -> PairRow:
        record = normalise({"prompt": prompt, "chosen": chosen, "rejected": rejected}) | {"verifier": "exact", "answer": "2"}
        sides = [dict.fromkeys(TARGETS, HeadScore(score, 0.0)) for score in (1.0 + lead, wrong)]
        return PairRow(record, 0.5, "bridging", sides[0], sides[1], (1, 1))

    rows = [verified("1+1", "2", "3", 0.5), verified("4-2", "2", "4", 0.25, wrong=2.0)]
    assert summary([*rows, *ROWS], [])["agreement"] == {"auc": 0.5, "auc_within": 0.5, "count": 4}
    rows.append(verified("4-2", "2 ", "1", 3.0))
    # Over all, 1.5 and 1.25 beat 1.0 twice each but not 2.0, 4.0 beats all: 7 of 9. Within: 1 of 1, and 3 of 4.
    assert summary(rows, [])["agreement"] == {"auc": pytest.approx(7 / 9), "auc_within": pytest.approx(0.875), "count": 6}
    assert summary(ROWS, [])["agreement"] is None


def test_pairs_watched_in_training_have_the_buckets_that_the_evaluation_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_trainer, "WATCHED_PAIRS", 4)
    stage = RewardStage.model_validate(STAGE)
    margins = [{"correctness": 0.0}, *({"correctness": 1 - number / 12} for number in range(11))]
    records = [normalise({"prompt": "p", "chosen": "a", "rejected": "b", "margins": one}) for one in margins]
    trainer: Any = SimpleNamespace(reward_stage=stage, section=stage)
    watched = HeldoutAccuracy(trainer, records)
    assert watched.records == records[1:5], "those that differ"
    assert watched.ranks == rank_pairs(records, difficulty_section(stage))[1:5]
    assert {bucket for _, bucket in watched.ranks} == {"contrastive"}, "among four alone each bucket would have some"


def test_calibration_and_length_bias_are_of_the_pairs_that_differ() -> None:
    found = summary(ROWS, [])
    assert found["calibration"]["correctness"] == calibrate([2.0, -1.0, 1.0, 0.0]).to_json()
    assert set(found["calibration"]) == {"correctness", "helpfulness"}, "one pair is too few for depth"
    bias = found["length_bias"]
    # Leads 2, -1, -0.5, 2, 0 at length margins 1, -2, 4, 1, 1: three of five longer answers score higher, one half.
    assert bias["count"] == 5 and bias["accuracy_longer_better"] == 2.5 / 4 and bias["accuracy_shorter_better"] == 0.0
    assert bias["share_longer_preferred"] == 3.5 / 5


def test_grades_are_correlated_with_the_probability_of_a_full_mark() -> None:
    answers = [
        GradeRow({"depth": grade}, dict.fromkeys(TARGETS, HeadScore(score, 0.0)))
        for grade, score in ((0.0, -800.0), (0.5, 0.0), (1.0, 800.0))
    ]
    assert summary(ROWS, answers)["grades"] == {"depth": {"pearson": pytest.approx(1.0), "count": 3}}
    assert summary(ROWS, answers[:1])["grades"] == {"depth": {"pearson": None, "count": 1}}


def test_a_line_of_pairs_says_all_about_a_pair() -> None:
    line: dict[str, Any] = json.loads(json.dumps(ROWS[2].to_json()))
    assert line == {
        "prompt": "p",
        "chosen": "good",
        "rejected": "bad",
        "source": "s",
        "kind": "single:depth",
        "bucket": "near_tie",
        "difficulty": 0.5,
        "margins": {"correctness": 0.0, "helpfulness": 0.25, "depth": 1.0},
        "scores": {
            "correctness": {"chosen": [1.0, 0.5], "rejected": [1.0, 0.25]},
            "helpfulness": {"chosen": [2.0, 0.5], "rejected": [1.0, 0.25]},
            "depth": {"chosen": [-1.0, 0.5], "rejected": [1.0, 0.25]},
        },
        "lengths": {"chosen": 6, "rejected": 2},
    }
    assert ROWS[4].to_json()["margins"] == {"correctness": None}, "a pair without labels counts for the first target"
