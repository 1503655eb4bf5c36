"""Verifiers: rules that say whether an answer is right, the top level of the hierarchy."""

from __future__ import annotations

from tokenize import TokenError
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.data import reasoning
from posttrain.reward.types import LevelScore, Sample, Verifier

RIGHT = 0.99
"""Least score of a right answer; reasoning-gym gives partial credit below it."""

# What a scorer may raise on an answer it cannot read. The answer is then not right, whatever was meant by it.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RecursionError,
    SyntaxError,
    TokenError,
    TypeError,
    ValueError,
)


class ReasoningGymVerifier:
    """Scores with the scorer of the reasoning-gym task that made the record.

    Some of the library's scorers evaluate the answer as an expression (`binary_matrix`, `n_queens`, those on sympy), so
    answers of models that are not trusted should be scored in a process that has nothing to lose.
    """

    name = "reasoning_gym"

    def verify(self, sample: Sample) -> LevelScore:
        """Score in [0, 1], 1 for a right answer; None, with the reason, where the scorer cannot read the answer.

        Raises:
            UserError: the record's `metadata` is missing or no entry of a known task.
        """
        metadata = _field(sample, "metadata")
        try:
            score = reasoning.score(sample.answer, metadata)
        except _UNREADABLE as error:
            return _level(None, {"unreadable": f"{type(error).__name__}: {error}"[:200]})
        return _level(score, {"expected": sample.reference.get("answer", "")})


class ExactVerifier:
    """Compares with the expected text, white space around both aside."""

    name = "exact"

    def verify(self, sample: Sample) -> LevelScore:
        """Score 1 when the texts are equal, else 0. UserError when the record has no `answer`."""
        expected = _field(sample, "answer")
        return _level(float(sample.answer.strip() == expected.strip()), {"expected": expected})


VERIFIERS: dict[str, Verifier] = {verifier.name: verifier for verifier in (ReasoningGymVerifier(), ExactVerifier())}


def verify(sample: Sample) -> LevelScore:
    """Score with the verifier that the record names; contribution 1 for a right answer, else 0.

    Raises:
        UserError: the record names no verifier, or an unknown one, or lacks what the verifier needs.
    """
    name = _field(sample, "verifier")
    if name not in VERIFIERS:
        raise UserError(f"unknown verifier '{name}'", instead=suggest(name, VERIFIERS))
    return VERIFIERS[name].verify(sample)


def is_right(level: LevelScore) -> bool:
    """Whether a verifier's level says that the answer is right (score of at least 0.99)."""
    return level.score is not None and level.score >= RIGHT


def _level(score: float | None, evidence: dict[str, Any]) -> LevelScore:
    # Partial credit does not count: reasoning-gym gives some for merely answering, which a policy would learn to collect.
    contribution = 1.0 if score is not None and score >= RIGHT else 0.0
    return LevelScore(name="verifier", score=score, weight=1.0, contribution=contribution, evidence=evidence)


def _field(sample: Sample, name: str) -> str:
    value = sample.reference.get(name)
    if not isinstance(value, str):
        raise UserError(f"a record to be verified has no '{name}'", instead="add the field to the data, or take another source")
    return value
