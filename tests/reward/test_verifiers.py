"""Verifiers: the table of them, exact answers, and the scorers of reasoning-gym."""

import subprocess
import sys
from itertools import islice
from typing import Any

import pytest

from posttrain.config.errors import UserError
from posttrain.data.reasoning import generate
from posttrain.reward.types import LevelScore, Sample, Verifier
from posttrain.reward.verifiers import VERIFIERS, ExactVerifier, ReasoningGymVerifier, is_right, verify


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
    assert all(name == verifier.name and isinstance(verifier, Verifier) for name, verifier in VERIFIERS.items())
    assert set(VERIFIERS) == {"reasoning_gym", "exact", "choice", "math", "code"}


def test_heavy_libraries_are_imported_when_they_are_used() -> None:
    program = (
        "import sys; from posttrain.reward.verifiers import VERIFIERS, verify; from posttrain.reward.rules import check;"
        "heavy = {'sympy', 'torch', 'reasoning_gym', 'py3langid', 'posttrain.sandbox', 'posttrain.reward.verifiers.code'};"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_is_right_needs_a_verdict() -> None:
    assert not is_right(LevelScore("verifier", None, 1.0, 0.0))
    assert not is_right(LevelScore("verifier", 0.98, 1.0, 0.0))
    assert is_right(LevelScore("verifier", 0.99, 1.0, 1.0))
