"""What is counted about scored answers: measures of a tree, pair accuracy, wins with their interval."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.pipeline.scoring import ScoredAnswer, compare, measures_of, pair_accuracies, pair_table, summarise, wins_table
from posttrain.reward.types import LevelScore, RewardBreakdown

TOTALS = st.integers(-3, 3).map(float)


def breakdown(total: float, correct: float | None = None) -> RewardBreakdown:
    """The evidence (none for None), and a dimension with a learned node and its attribute."""
    depth = LevelScore("depth", 2 * total, 0, 0)
    learned = LevelScore("learned", 9.0, 0, 0, {}, (depth,))
    rest = LevelScore("rest", total, 1, total, {}, (LevelScore("helpfulness", total, 1, total, {}, (learned,)),))
    return RewardBreakdown(total, (LevelScore("correctness", correct, 1, 0, {}, (LevelScore("verifier", correct, 1, 0),)), rest))


def answer(prompt: str, total: float, side: str = "completion", **fields: object) -> ScoredAnswer:
    record = {"prompt": [{"role": "user", "content": prompt}], side: [{"role": "assistant", "content": "x"}], **fields}
    return ScoredAnswer(record, side, breakdown(total))


def test_measures_are_named_by_dimension_and_no_verdict_is_left_out() -> None:
    assert measures_of(breakdown(0.5)) == {"total": 0.5, "rest": 0.5, "rest/helpfulness": 0.5, "rest/helpfulness/depth": 1.0}
    assert measures_of(breakdown(0.5, 1.0))["correctness"] == 1.0 and "correctness/verifier" not in measures_of(
        breakdown(0.5, 1.0)
    )


def test_one_answer_has_no_deviation() -> None:
    assert summarise([answer("a", 1.0)])["total"].deviation is None
    found = summarise([answer("a", 1.0), answer("b", 3.0)])["total"]
    assert (found.count, found.mean, found.deviation) == (2, 2.0, pytest.approx(2**0.5))


def test_a_dimension_counts_the_pairs_that_differ_in_it_and_ties_count_half() -> None:
    margins = [{"helpfulness": 1.0}, {"helpfulness": 0.0}, {"helpfulness": 0.5}, None]
    leads = [1.0, 1.0, 0.0, -1.0]
    answers = []
    for number, (margin, lead) in enumerate(zip(margins, leads, strict=True)):
        fields = {} if margin is None else {"margins": margin}
        answers += [answer(str(number), lead, "chosen", **fields), answer(str(number), 0.0, "rejected", **fields)]
    found = pair_accuracies(answers)
    assert (found["total"].count, found["total"].accuracy) == (4, 2.5 / 4)
    # The pair that is equal in helpfulness is left out, the one without margins is not.
    assert (found["rest/helpfulness"].count, found["rest/helpfulness"].accuracy) == (3, 1.5 / 3)
    # No margin names depth: only the pair without margins speaks about it.
    assert (found["rest/helpfulness/depth"].count, found["rest/helpfulness/depth"].accuracy) == (1, 0.0)
    assert "62.5 %" in str(pair_table(found))


@given(st.lists(st.tuples(TOTALS, TOTALS), min_size=1, max_size=20), st.integers(0, 3))
def test_turning_a_comparison_round_turns_its_numbers_round(totals: list[tuple[float, float]], seed: int) -> None:
    first = [answer(str(number), one) for number, (one, _) in enumerate(totals)]
    second = [answer(str(number), other) for number, (_, other) in enumerate(totals)]
    there, back = compare(first, second, seed)["total"], compare(second, first, seed)["total"]
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)
    assert there.wins + there.ties + there.losses == there.count == len(totals)
    assert there.share == pytest.approx(1 - back.share) and there.low <= there.share <= there.high
    assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low))
    assert there.difference == pytest.approx(-back.difference)


def test_several_answers_to_a_prompt_count_by_their_mean() -> None:
    first = [answer("a", 0.0), answer("a", 3.0), answer("alone", 9.0)]
    found = compare(first, [answer("a", 1.0)])["total"]
    assert (found.count, found.wins, found.difference) == (1, 1, 0.5)
    assert wins_table({"total": found}, 1).note == "1 prompt stands in one file alone and is left out."
    assert wins_table({"total": found}, 2).note == "2 prompts stand in one file alone and are left out."
    assert wins_table({"total": found}, 0).note == ""


def test_files_without_a_shared_prompt_are_refused() -> None:
    with pytest.raises(UserError, match="no prompt in common"):
        compare([answer("a", 0.0)], [answer("b", 0.0)])
