"""Verifiers, and the hierarchy that composes them with the learned level."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.data.reasoning import generate
from posttrain.reward.hierarchy import HierarchicalReward
from posttrain.reward.types import LevelScore, RewardModel, Sample, Verifier
from posttrain.reward.verifiers import VERIFIERS, ExactVerifier, ReasoningGymVerifier, is_right, verify

FINITE = st.floats(-1e6, 1e6)


class Constant:
    """A learned level that gives the scores it was made with."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.given = list(scores)

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        return self.given[: len(samples)]


def exact(answer: str, expected: str = "46") -> Sample:
    return Sample([{"role": "user", "content": "12 + 34?"}], answer, {"verifier": "exact", "answer": expected})


def generated(task: str, answer: str | None = None) -> Sample:
    record = next(generate(task, {}, seed=1))
    return Sample(record["prompt"], record["answer"] if answer is None else answer, record)


@pytest.mark.parametrize(("answer", "right"), [("46", True), (" 46\n", True), ("47", False), ("", False), ("4 6", False)])
def test_exact_compares_texts_without_white_space_around_them(answer: str, right: bool) -> None:
    level = verify(exact(answer))
    assert is_right(level) is right
    assert (level.name, level.weight, level.contribution, level.score) == ("verifier", 1.0, float(right), float(right))


def test_generated_tasks_are_scored_by_their_own_scorer() -> None:
    assert is_right(verify(generated("chain_sum")))
    # The library gives a little for merely answering; it must not be worth anything.
    level = verify(generated("simple_equations", "12345678"))
    assert not is_right(level) and level.contribution == 0.0


def test_partial_credit_is_kept_as_score_and_counts_nothing() -> None:
    sample = generated("chain_sum")
    wordy = Sample(sample.prompt, f"{sample.answer} I think", sample.reference)
    level = verify(wordy)
    assert level.score is not None and 0 < level.score < 0.99
    assert level.contribution == 0.0


def test_scores_equal_those_of_the_library_itself() -> None:
    import reasoning_gym

    for record in islice(generate("spell_backward", {}, seed=2), 20):
        for answer in (record["answer"], record["answer"][:-1], "x", ""):
            ours = verify(Sample(record["prompt"], answer, record)).score
            scorer = reasoning_gym.get_score_answer_fn("spell_backward")
            assert ours == scorer(answer, {"answer": record["answer"], "metadata": {}})


def test_an_answer_that_the_scorer_cannot_read_has_no_verdict() -> None:
    level = verify(generated("prime_factorization", "two times three"))
    assert level.score is None and level.contribution == 0.0 and not is_right(level)
    assert "ValueError" in level.evidence["unreadable"]


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ({}, "no 'verifier'"),
        ({"verifier": "exakt", "answer": "1"}, "unknown verifier 'exakt'; did you mean 'exact'"),
        ({"verifier": "exact"}, "no 'answer'"),
        ({"verifier": "reasoning_gym"}, "no 'metadata'"),
        ({"verifier": "reasoning_gym", "metadata": "{"}, "metadata is not JSON"),
        ({"verifier": "reasoning_gym", "metadata": "[]"}, "not a reasoning-gym entry"),
        (
            {"verifier": "reasoning_gym", "metadata": '{"question": "q", "answer": "a", "metadata": {}}'},
            "names no reasoning_gym task",
        ),
        (
            {"verifier": "reasoning_gym", "metadata": '{"question": "q", "answer": "a", "metadata": {}, "task": "chain_sums"}'},
            "did you mean 'chain_sum'",
        ),
    ],
)
def test_records_that_cannot_be_verified_are_refused(reference: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        verify(Sample([{"role": "user", "content": "q"}], "a", reference))


def test_the_ports_are_kept() -> None:
    assert isinstance(ReasoningGymVerifier(), Verifier) and isinstance(ExactVerifier(), Verifier)
    assert isinstance(HierarchicalReward(None, 0.1), RewardModel)
    assert all(name == verifier.name for name, verifier in VERIFIERS.items())


def test_without_a_learned_level_the_verifier_decides_alone() -> None:
    right, wrong = HierarchicalReward(None, 0.4).score([exact("46"), exact("45")])
    assert (right.total, wrong.total) == (1.0, 0.0)
    assert [level.name for level in right.levels] == ["verifier"]
    with pytest.raises(KeyError):
        right.level("learned")


@given(FINITE, FINITE, st.floats(0, 0.499))
def test_the_learned_level_never_overrules_the_verifier(of_right: float, of_wrong: float, weight: float) -> None:
    right, wrong = HierarchicalReward(Constant([of_right, of_wrong]), weight).score([exact("46"), exact("45")])
    assert right.total - wrong.total > 0.5
    for breakdown in (right, wrong):
        assert breakdown.total == sum(level.contribution for level in breakdown.levels)
        assert breakdown.level("learned").weight == weight


def test_the_learned_level_ranks_equals() -> None:
    low, high = HierarchicalReward(Constant([-1.0, 2.0]), 0.1).score([exact("45"), exact("44")])
    assert low.total == pytest.approx(0.1 / (1 + math.exp(1.0)))
    assert high.total == pytest.approx(0.1 / (1 + math.exp(-2.0)))
    assert high.level("learned").score == 2.0


@pytest.mark.parametrize("weight", [-0.1, 0.5, 1.0])
def test_weights_that_could_overrule_the_verifier_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="learned_weight"):
        HierarchicalReward(None, weight)


def test_a_learned_level_with_too_few_scores_is_noticed() -> None:
    with pytest.raises(ValueError):
        HierarchicalReward(Constant([1.0]), 0.1).score([exact("46"), exact("45")])


def test_is_right_needs_a_verdict() -> None:
    assert not is_right(LevelScore("verifier", None, 1.0, 0.0))
    assert not is_right(LevelScore("verifier", 0.98, 1.0, 0.0))
    assert is_right(LevelScore("verifier", 0.99, 1.0, 1.0))
