"""Composition, the third level: from the evidence about one answer to its total, as a tree. Pure; docs/reward.md has the reasons.

    a gate is closed:  total = gate_value
    else:              total = (1 if the evidence says right, else 0) + learned_weight * mean of q_d, weighted by dimension

q_d in [0, 1] is the best evidence for dimension d: the judges' mean, else what rules and learned level say; a dimension that
nothing speaks about is left out. The paper (MiniMax-01, section 5) names the dimensions and a hierarchy and prints no formula;
this one is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from posttrain.config.dimensions import ATTRIBUTES, DIMENSIONS
from posttrain.config.errors import UserError
from posttrain.config.reward_schema import RewardSection
from posttrain.reward.heads import HeadScore
from posttrain.reward.types import LevelScore, RewardBreakdown

AGREES = 0.75
"""Least mean grade of the judges of correctness that counts as right: the second best of five grades."""


@dataclass(frozen=True)
class Evidence:
    """All that is known about one answer; None, or empty, where nobody spoke.

    Attributes:
        verifier: verdict of the record's verifier.
        rules: share of the record's constraints kept, with a part for each.
        format_share: share of its format rules kept.
        judges: verdicts with the dimension that each is about; score in [0, 1], None is no verdict.
        learned: logits by target.
        domain: of the record.
    """

    verifier: LevelScore | None = None
    rules: LevelScore | None = None
    format_share: float | None = None
    judges: tuple[tuple[str, LevelScore], ...] = ()
    learned: Mapping[str, HeadScore] = field(default_factory=dict)
    domain: str | None = None

    def verdicts(self, dimension: str) -> list[LevelScore]:
        """The judges' nodes about a dimension, those without a verdict among them."""
        return [level for about, level in self.judges if about == dimension]


@dataclass(frozen=True)
class _Quality:
    """q of a dimension, and the nodes that it is the weighted mean of (their shares sum to 1, or there are none)."""

    value: float
    nodes: tuple[tuple[float, LevelScore, float], ...]  # share, node, the node's own q


def compose(evidence: Evidence, section: RewardSection) -> RewardBreakdown:
    """The total of one answer, with the levels "gates" (where any are set), "correctness" and "rest" (where anything speaks).

    Open gates add nothing. With gates open the total lies in [0, 1 + learned_weight], and every right answer lies above every
    wrong one, since learned_weight is below 0.5.

    Raises:
        UserError: a harmlessness gate that nothing can speak about.
    """
    qualities = {name: quality for name in DIMENSIONS if (quality := _quality(name, evidence, section)) is not None}
    gates = _gates(evidence, qualities, section)
    levels = [level for level in (_correctness(evidence, section), _rest(qualities, evidence.domain, section)) if level]
    if gates is not None:
        levels = [gates, *([_muted(level) for level in levels] if gates.evidence["closed"] else levels)]
    dropped = section.no_verdict == "drop" and any(level.score is None for _, level in evidence.judges)
    return RewardBreakdown(sum(level.contribution for level in levels), tuple(levels), dropped)


def _gates(evidence: Evidence, qualities: Mapping[str, _Quality], section: RewardSection) -> LevelScore | None:
    """A part for each gate; the score is 1 when all are open. None without gates."""
    if not section.gates:
        return None
    parts: list[LevelScore] = []
    closed: list[str] = []
    for name, least in section.gates.items():
        if name == "harmlessness":
            if name not in qualities:
                raise UserError(
                    "the harmlessness gate has nothing to go by",
                    where="reward.gates",
                    instead="add a constitution judge of harmlessness, a reward model with a head for it, or take the gate out",
                )
            found: float | None = qualities[name].value
            by = [node.name for _, node, _ in qualities[name].nodes]
        else:
            found, by = evidence.format_share, ["rules"]
        # A record without format rules has none to break.
        if found is not None and found < least:
            closed.append(name)
        parts.append(LevelScore(f"gate:{name}", found, 0.0, 0.0, {"least": least, "open": name not in closed, "by": by}))
    if not closed:
        return LevelScore("gates", 1.0, 0.0, 0.0, {"closed": closed}, tuple(parts))
    each = section.gate_value / len(closed)
    shared = tuple(part if part.evidence["open"] else replace(part, contribution=each) for part in parts)
    return LevelScore("gates", 0.0, 0.0, section.gate_value, {"closed": closed}, shared)


def _correctness(evidence: Evidence, section: RewardSection) -> LevelScore | None:
    """The verifier where the record has one, else the judges of correctness; None without either."""
    if evidence.verifier is not None:
        level = evidence.verifier
        return LevelScore("correctness", level.score, level.weight, level.contribution, {"by": level.name}, (level,))
    judges = evidence.verdicts("correctness")
    if not judges:
        return None
    score = _mean_verdict(judges, section)
    contribution = 1.0 if score is not None and score >= AGREES else 0.0
    spoke = sum(level.score is not None for level in judges)
    parts = tuple(
        replace(level, weight=1.0 / spoke, contribution=contribution / spoke) if level.score is not None else level
        for level in judges
    )
    return LevelScore("correctness", score, 1.0, contribution, {"by": "judges", "right from": AGREES}, parts)


def _rest(qualities: Mapping[str, _Quality], domain: str | None, section: RewardSection) -> LevelScore | None:
    """The weighted mean over the dimensions that something speaks about; None where they weigh nothing."""
    weights = section.domains.get(domain, section.weights) if domain is not None else section.weights
    weighed: dict[str, float] = {name: weights.get(name, 0.0) for name in DIMENSIONS if name in qualities}  # type: ignore[call-overload]
    total = math.fsum(weighed.values())
    if total <= 0:
        return None
    parts, mean = [], 0.0
    for name, weight in weighed.items():
        share = weight / total
        mean += share * qualities[name].value
        parts.append(_dimension(name, qualities[name], section.learned_weight * share))
    evidence = {"domain": domain} if domain in section.domains else {}
    return LevelScore("rest", mean, section.learned_weight, section.learned_weight * mean, evidence, tuple(parts))


def _dimension(name: str, quality: _Quality, weight: float) -> LevelScore:
    parts = tuple(
        replace(node, weight=weight * share, contribution=weight * share * value, parts=_scaled(node.parts, weight * share))
        for share, node, value in quality.nodes
    )
    return LevelScore(name, quality.value, weight, weight * quality.value, {}, parts)


def _shares(parts: tuple[LevelScore, ...], values: Sequence[float]) -> tuple[LevelScore, ...]:
    """The parts of a node that is the plain mean of their values, each with its share of the node's own value."""
    share = 1 / len(parts) if parts else 0.0
    return tuple(replace(part, weight=share, contribution=share * value) for part, value in zip(parts, values, strict=True))


def _scaled(parts: tuple[LevelScore, ...], factor: float) -> tuple[LevelScore, ...]:
    """Parts with shares of a node's value, as shares of what the node added."""
    return tuple(
        replace(part, weight=part.weight * factor, contribution=part.contribution * factor, parts=_scaled(part.parts, factor))
        for part in parts
    )


def _quality(dimension: str, evidence: Evidence, section: RewardSection) -> _Quality | None:
    """The best evidence for a dimension, None where nothing speaks about it."""
    judges = evidence.verdicts(dimension)
    if judges and (score := _mean_verdict(judges, section)) is not None:
        counted = judges if section.no_verdict == "zero" else [level for level in judges if level.score is not None]
        if dimension == "correctness":  # shown with its evidence in the level of that name
            counted = [replace(level, evidence={}, parts=()) for level in counted]
        return _Quality(score, tuple((1 / len(counted), level, level.score or 0.0) for level in counted))
    found = []
    rules = evidence.rules
    if dimension == "helpfulness" and rules is not None and rules.score is not None:
        shares = _shares(rules.parts, [part.score or 0.0 for part in rules.parts])
        found.append((replace(rules, parts=shares), rules.score))
    if (learned := _learned(dimension, evidence.learned, section.pessimism)) is not None:
        found.append((learned, float(learned.evidence["squashed"])))
    if found:
        share = 1 / len(found)
        return _Quality(sum(share * value for _, value in found), tuple((share, node, value) for node, value in found))
    # Judges that gave no verdict, and nothing to go on with.
    return _Quality(0.0, tuple((1 / len(judges), level, 0.0) for level in judges)) if judges else None


def _mean_verdict(judges: list[LevelScore], section: RewardSection) -> float | None:
    """Mean score; None where no judge gave one, unless the config counts that as 0."""
    scores = [level.score for level in judges if level.score is not None]
    if section.no_verdict == "zero":
        return sum(scores) / len(judges)
    return sum(scores) / len(scores) if scores else None


def _learned(dimension: str, heads: Mapping[str, HeadScore], pessimism: float) -> LevelScore | None:
    """The learned node of a dimension; helpfulness without a head of its own is the mean of its attributes."""
    attributes = []
    if dimension == "helpfulness":
        attributes = [_head(name, heads[name], pessimism) for name in ATTRIBUTES if name in heads]
    if dimension in heads:
        return replace(_head("learned", heads[dimension], pessimism), parts=tuple(attributes))
    if not attributes:
        return None
    squashed = [float(node.evidence["squashed"]) for node in attributes]
    mean = sum(squashed) / len(squashed)
    return LevelScore("learned", mean, 0.0, 0.0, {"squashed": mean}, _shares(tuple(attributes), squashed))


def _head(name: str, head: HeadScore, pessimism: float) -> LevelScore:
    squashed = sigmoid(head.mean - pessimism * head.std)
    evidence = {"squashed": squashed, "std": head.std} if head.std else {"squashed": squashed}
    return LevelScore(name, head.mean, 0.0, 0.0, evidence)


def _muted(node: LevelScore) -> LevelScore:
    """The node as it was scored, adding nothing."""
    return replace(node, weight=0.0, contribution=0.0, parts=tuple(_muted(part) for part in node.parts))


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), for any finite value."""
    # math.exp overflows on large arguments, so the exponent is kept negative.
    small = math.exp(-abs(value))
    return 1.0 / (1.0 + small) if value >= 0 else small / (1.0 + small)
