"""The hierarchical reward: gathers the evidence about answers from verifiers, rules, judges and heads, and composes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import RewardSection
from posttrain.reward.composition import Evidence, compose
from posttrain.reward.heads import HeadScore
from posttrain.reward.types import LevelScore, RewardBreakdown, Sample
from posttrain.reward.verifiers import is_right, verify

if TYPE_CHECKING:
    from posttrain.reward.judges import Judge  # with an HTTP client, which most rewards do without


class DimensionScorer(Protocol):
    """What the learned level must offer; `posttrain.reward.learned.LearnedLevel` does."""

    def dimension_scores(self, samples: Sequence[Sample]) -> list[dict[str, HeadScore]]:
        """The logit of every target for each sample, in order."""
        ...


class HierarchicalReward:
    """Scores answers by `section`; the formula is in `posttrain.reward.composition`.

    Judges of correctness are not asked about records with a verifier, which decides there.

    Args:
        section: gates, weights and rules of composition.
        learned: the learned level, or None without one.
        judges: what `posttrain.reward.judges.build_judges` makes of the section's judges.
    """

    def __init__(self, section: RewardSection, learned: DimensionScorer | None = None, judges: Sequence[Judge] = ()) -> None:
        self.section, self.learned, self.judges = section, learned, tuple(judges)

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        """One breakdown a sample, in order.

        Raises:
            UserError: a record that cannot be verified, constraints that cannot be checked, or an answer that nothing scores.
        """
        if not samples:
            return []
        of_heads: list[dict[str, HeadScore]] = [{}] * len(samples)
        if self.learned is not None:
            of_heads = self.learned.dimension_scores(samples)
        verdicts = self._verdicts(samples)
        return [
            compose(self._evidence(sample, heads, judged), self.section)
            for sample, heads, judged in zip(samples, of_heads, verdicts, strict=True)
        ]

    def _evidence(self, sample: Sample, heads: dict[str, HeadScore], judged: Sequence[tuple[str, LevelScore]]) -> Evidence:
        verifier = verify(sample) if has_verifier(sample) else None
        rules, format_share = _check_rules(sample)
        if verifier is None and rules is None and not judged and not heads:
            raise UserError(
                "nothing scores an answer to a record without a verifier",
                instead="give it a field `verifier` or `constraints`, or name a reward model or a judge",
            )
        return Evidence(verifier, rules, format_share, tuple(judged), heads, sample.reference.get("domain"))

    def _verdicts(self, samples: Sequence[Sample]) -> list[list[tuple[str, LevelScore]]]:
        """The judges' nodes for each sample, without those of judges that had nothing to go by."""
        found: list[list[tuple[str, LevelScore]]] = [[] for _ in samples]
        for judge in self.judges:
            asked = [i for i, sample in enumerate(samples) if judge.dimension != "correctness" or not has_verifier(sample)]
            for index, level in zip(asked, judge.judge([samples[i] for i in asked]), strict=True):
                if level.evidence.get("applicable", True):
                    found[index].append((judge.dimension, level))
        return found


def has_verifier(sample: Sample) -> bool:
    """Whether the sample's record says how its answers are verified; without, the prompt is open-ended."""
    return "verifier" in sample.reference


def verified(breakdown: RewardBreakdown) -> bool | None:
    """Whether the verifier calls the answer right; None for an open-ended prompt."""
    try:
        return is_right(breakdown.level("verifier"))
    except KeyError:
        return None


def passed_gates(breakdown: RewardBreakdown) -> bool:
    """Whether no gate stopped the answer."""
    return not any(level.name == "gates" and level.evidence["closed"] for level in breakdown.levels)


def uncertainty(breakdown: RewardBreakdown) -> float | None:
    """Mean standard deviation among the ensemble's heads that scored the answer; None without an ensemble."""
    spreads: list[Any] = [node.evidence["std"] for level in breakdown.levels for node in level.nodes() if "std" in node.evidence]
    return float(sum(spreads) / len(spreads)) if spreads else None


def _check_rules(sample: Sample) -> tuple[LevelScore | None, float | None]:
    """The node of the record's constraints, and the share of its format rules kept."""
    if "constraints" not in sample.reference:
        return None, None
    from posttrain.reward import rules  # language detection among them, which few records ask for

    level = rules.check(sample)
    return level, None if level is None else rules.gate_share(level)
