"""Answers to reasoning-gym's tasks, scored by the task that made the record."""

from __future__ import annotations

from tokenize import TokenError

from posttrain.data import reasoning
from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers.verdict import required, verdict

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
        metadata = required(sample, "metadata")
        try:
            score = reasoning.score(sample.answer, metadata)
        except _UNREADABLE as error:
            return verdict(None, {"unreadable": f"{type(error).__name__}: {error}"[:200]})
        return verdict(score, {"expected": sample.reference.get("answer", "")})
