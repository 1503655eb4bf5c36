"""What online RL keeps of every scored answer, and what it notes of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.reward.guards.drift import StepFacts
from posttrain.reward.hierarchy import uncertainty, verified
from posttrain.reward.types import RewardBreakdown
from posttrain.stages.sampling import Answer


@dataclass(frozen=True)
class ScoredAnswer:
    """Numbers of one answer, small enough to be gathered from all ranks.

    Attributes:
        total: reward.
        dropped: takes no part in training.
        right: what the verifier says; None for an open-ended prompt.
        uncertainty: of the learned level; None without an ensemble.
        levels: top level -> what it added to the total.
        length, prompt_length: in tokens.
    """

    total: float
    dropped: bool
    right: bool | None
    uncertainty: float | None
    levels: Mapping[str, float]
    length: int
    prompt_length: int

    @classmethod
    def of(cls, answer: Answer, breakdown: RewardBreakdown) -> ScoredAnswer:
        """Of an answer and its breakdown."""
        return cls(
            breakdown.total,
            breakdown.dropped,
            verified(breakdown),
            uncertainty(breakdown),
            {level.name: level.contribution for level in breakdown.levels},
            len(answer.token_ids),
            len(answer.prompt_ids),
        )


def step_facts(samples: Sequence[ScoredAnswer]) -> StepFacts:
    """Means over a step's samples but the dropped ones; accuracy over the verified ones, uncertainty over those that have one."""
    samples = _kept(samples)
    return StepFacts(
        reward=sum(sample.total for sample in samples) / len(samples),
        length=sum(sample.length for sample in samples) / len(samples),
        accuracy=_mean([sample.right for sample in samples if sample.right is not None]),
        uncertainty=_mean([sample.uncertainty for sample in samples if sample.uncertainty is not None]),
    )


def step_metrics(samples: Sequence[ScoredAnswer]) -> dict[str, float]:
    """The step's metrics: "reward", "reward/LEVEL" (what each top level added, so that they sum to "reward"), "accuracy",
    "answer_length", "dropped" (number of samples), "uncertainty"; left out where no sample has one. Means leave out dropped
    samples, unless all are."""
    facts = step_facts(samples)
    metrics = {"reward": facts.reward, "answer_length": facts.length, "dropped": float(sum(s.dropped for s in samples))}
    if facts.accuracy is not None:
        metrics["accuracy"] = facts.accuracy
    if facts.uncertainty is not None:
        metrics["uncertainty"] = facts.uncertainty
    kept = _kept(samples)
    for name in dict.fromkeys(name for sample in kept for name in sample.levels):
        metrics[f"reward/{name}"] = sum(sample.levels.get(name, 0.0) for sample in kept) / len(kept)
    return metrics


def _kept(samples: Sequence[ScoredAnswer]) -> Sequence[ScoredAnswer]:
    """The samples that take part in training, or all of them where none does."""
    return [sample for sample in samples if not sample.dropped] or samples


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
