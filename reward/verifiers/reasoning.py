"""Answers to reasoning-gym's tasks, scored by the task that made the record."""

from __future__ import annotations

from tokenize import TokenError

from posttrain.data import reasoning
from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers.reasoning_contained import EVALUATING, check_uncontained, score_contained
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

    Some of the library's scorers evaluate the answer as a program (countdown, puzzle24, n_queens, ...). Those run in a sandbox, a
    process for each answer; see reasoning_contained.py. All others run here.
    """

    name = "reasoning_gym"

    def verify(self, sample: Sample) -> LevelScore:
        """Score in [0, 1], 1 for a right answer; None, with the reason, where the scorer cannot read the answer.

        An answer that does more than to be evaluated, or takes too long to be, scores 0 with the reason.

        Raises:
            UserError: the record's `metadata` is missing or no entry of a known task, or the task needs a sandbox and none can be
                made here.
        """
        entry = reasoning.read_entry(required(sample, "metadata"))
        if entry.task in EVALUATING:
            contained, evidence = score_contained(sample.answer, entry)
            return verdict(contained, {"expected": sample.reference.get("answer", ""), **evidence})
        try:
            if reason := check_uncontained(sample.answer, entry):
                return verdict(0.0, {"reason": f"the answer {reason}"})
            score = reasoning.score(sample.answer, entry)
        except _UNREADABLE as error:
            return verdict(None, {"unreadable": f"{type(error).__name__}: {error}"[:200]})
        return verdict(score, {"expected": sample.reference.get("answer", "")})
