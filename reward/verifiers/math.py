"""Answers that are mathematics, compared by value with math-verify."""

from __future__ import annotations

import os
from functools import lru_cache

from posttrain.config.errors import UserError
from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers.math_notation import answer_readings, expected_readings
from posttrain.reward.verifiers.math_pool import Comparison, MathPool
from posttrain.reward.verifiers.verdict import required, verdict

SECONDS = 5.0
"""Longest time of a comparison; most take milliseconds."""


class MathVerifier:
    """Compares by value with the expected answer: 1/2, 0.5 and 50% are equal, so are {1, 2} and "2, 1", x+1 and 1+x.

    The `answer` of the record is LaTeX, with or without dollar signs, or plain ("3/4", "sqrt(2)", "(-inf, 3]"). The result of an
    answer is what it puts into a box, else what follows the last "answer is" or "answer:", else the last expression.

    Where the expected answer is a number, a number is required: "12+34" equals 46, yet a policy that learned to repeat the
    question would be paid for it. A unit is not compared, nor is a fraction reduced before it counts.

    Comparisons run in child processes that are killed after `seconds`, so any thread or Ray actor can use one verifier.

    Args:
        seconds: longest time of a comparison.
        workers: most child processes; None takes one a processor, four at most.
    """

    name = "math"

    def __init__(self, seconds: float = SECONDS, workers: int | None = None) -> None:
        self._pool = _pool(seconds, workers or min(4, os.cpu_count() or 1))

    def verify(self, sample: Sample) -> LevelScore:
        """Score 1 for a right answer, else 0, also where the answer cannot be read or takes too long; evidence says which.

        Raises:
            UserError: the record has no `answer`, or one that is no mathematics, or one too costly to evaluate.
        """
        text = required(sample, "answer")
        readings = expected_readings(text)
        if not readings:
            raise _unreadable(text, "cannot be read as mathematics")
        result = self._pool.compare(readings, answer_readings(sample.answer))
        if result.expected is None:
            raise _unreadable(text, result.failure or "cannot be read as mathematics")
        evidence = {"expected": result.expected, "read": result.read}
        if reason := _reason(result, sample.answer):
            evidence["reason"] = reason
        return verdict(float(result.right), evidence)


@lru_cache
def _pool(seconds: float, workers: int) -> MathPool:
    return MathPool(seconds, workers)


def _reason(result: Comparison, answer: str) -> str:
    """Why an answer is wrong, where it is not simply another value."""
    if result.failure:
        return result.failure
    if result.read is None:
        return "cannot be read as mathematics" if answer.strip() else "is empty"
    return "" if result.evaluated else "is not one worked-out number"


def _unreadable(text: str, why: str) -> UserError:
    return UserError(
        f"the expected answer '{text[:80]}' {why}",
        instead="write it in LaTeX between dollar signs, or take the verifier 'exact' or 'choice'",
    )
