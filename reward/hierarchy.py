"""The hierarchical reward: the verifier decides, the learned level ranks what it leaves equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from posttrain.reward.types import LevelScore, RewardBreakdown, Sample
from posttrain.reward.verifiers import verify


class LearnedScorer(Protocol):
    """What the learned level must offer; `posttrain.reward.learned.LearnedLevel` does."""

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """One unbounded score a sample, in order; higher is better."""
        ...


class HierarchicalReward:
    """total = (1 if the verifier says right, else 0) + learned_weight * sigmoid(learned score).

    With a weight below 0.5 the learned level never overrules the verifier: every right answer scores above every wrong one.
    The total lies in [0, 1 + learned_weight).

    Args:
        learned: the learned level, or None for the verifier alone.
        learned_weight: its weight, in [0, 0.5); ValueError otherwise.
    """

    def __init__(self, learned: LearnedScorer | None, learned_weight: float) -> None:
        if not 0 <= learned_weight < 0.5:
            raise ValueError(f"learned_weight must be in [0, 0.5), got {learned_weight}")
        self.learned, self.learned_weight = learned, learned_weight

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        """One breakdown a sample, in order, with the levels "verifier" and, where there is one, "learned"."""
        levels = [[verify(sample)] for sample in samples]
        if self.learned is not None:
            for of_sample, score in zip(levels, self.learned.scores(samples), strict=True):
                of_sample.append(self._learned_level(score))
        return [RewardBreakdown(sum(level.contribution for level in of_sample), tuple(of_sample)) for of_sample in levels]

    def _learned_level(self, score: float) -> LevelScore:
        squashed = _sigmoid(score)
        return LevelScore("learned", score, self.learned_weight, self.learned_weight * squashed, {"squashed": squashed})


def _sigmoid(value: float) -> float:
    # math.exp overflows on large arguments, so the exponent is kept negative.
    small = math.exp(-abs(value))
    return 1.0 / (1.0 + small) if value >= 0 else small / (1.0 + small)
