"""Answers compared with the expected text, letter by letter."""

from __future__ import annotations

from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers.verdict import required, verdict


class ExactVerifier:
    """Compares with the expected text, white space around both aside."""

    name = "exact"

    def verify(self, sample: Sample) -> LevelScore:
        """Score 1 when the texts are equal, else 0. UserError when the record has no `answer`."""
        expected = required(sample, "answer")
        return verdict(float(sample.answer.strip() == expected.strip()), {"expected": expected})
