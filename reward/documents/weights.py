"""From grades of documents to weights of sources: low grades are thinned, never dropped.

MiniMax-01 (section 4) begins with equal weights, tilts them towards quality and keeps some of what is graded low; it
publishes no formula, so the line below is ours:

    factor = floor + (1 - floor) * quality,   quality = mean of depth and helpfulness, in [0, 1]

A group's weight is its weight at the start times its factor, divided by the sum over groups; so the worst group keeps at least
`floor` of what the best has, for equal starts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posttrain.reward.documents.grading import DocumentGrade

FLOOR = 0.1
"""Default least factor."""


@dataclass(frozen=True)
class GroupWeight:
    """The weight of a source, or of a category within a source.

    Attributes:
        source: name of the source.
        category: name of the category; None where sources are weighed as a whole.
        weight: share of the mixture; the weights of all groups sum to 1.
        quality: mean quality of the group's graded documents; None where none has a grade. Such a group takes the mean
            factor of the others.
        graded: documents with a grade.
        ungraded: documents without.
    """

    source: str
    category: str | None
    weight: float
    quality: float | None
    graded: int
    ungraded: int

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def source_weights(
    grades: Sequence[DocumentGrade],
    floor: float = FLOOR,
    *,
    by_category: bool = False,
    start: Mapping[str, float] | None = None,
) -> list[GroupWeight]:
    """Weights that follow the grades.

    A higher grade never lowers its own group's weight, and of two groups that started equal the better one weighs no less.

    Args:
        grades: of the documents of all sources.
        floor: least factor, in (0, 1]; 1 leaves the weights at the start alone.
        by_category: a weight for each category of each source. A source's start is divided among its categories by their
            number of documents.
        start: positive weight of each source before grading; None takes all as equal.

    Returns:
        One weight a group, in order of first appearance; empty for no grades.

    Raises:
        ValueError: floor outside (0, 1], or a source without a positive finite start.
    """
    _check_floor(floor)
    groups: dict[tuple[str, str | None], list[DocumentGrade]] = defaultdict(list)
    documents: dict[str, int] = defaultdict(int)
    for grade in grades:
        groups[grade.source, grade.category if by_category else None].append(grade)
        documents[grade.source] += 1
    starts = _starts(documents, start)
    qualities = [_mean([grade.quality for grade in members if grade.quality is not None]) for members in groups.values()]
    factors = _factors(qualities, floor)
    raw = [
        starts[source] * len(members) / documents[source] * factor
        for ((source, _), members), factor in zip(groups.items(), factors, strict=True)
    ]
    total = math.fsum(raw)
    return [
        GroupWeight(source, category, weight / total, quality, graded, len(members) - graded)
        for ((source, category), members), weight, quality in zip(groups.items(), raw, qualities, strict=True)
        for graded in [sum(grade.quality is not None for grade in members)]
    ]


def thinning(grades: Sequence[DocumentGrade], floor: float = FLOOR) -> list[float]:
    """The probability with which each document is kept: its factor, in [floor, 1].

    A document without a grade is kept with the mean probability of the graded ones, so that a judge that fails on some does
    not favour them; with no grade at all every document is kept.

    Raises:
        ValueError: floor outside (0, 1].
    """
    _check_floor(floor)
    return _factors([grade.quality for grade in grades], floor)


def _factors(qualities: Sequence[float | None], floor: float) -> list[float]:
    known = [_factor(quality, floor) for quality in qualities if quality is not None]
    neutral = _mean(known)
    return [_factor(quality, floor) if quality is not None else 1.0 if neutral is None else neutral for quality in qualities]


def _factor(quality: float, floor: float) -> float:
    return min(1.0, floor + (1.0 - floor) * quality)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _starts(sources: Mapping[str, int], start: Mapping[str, float] | None) -> Mapping[str, float]:
    if start is None:
        return dict.fromkeys(sources, 1.0)
    for source in sources:
        if not (math.isfinite(weight := start.get(source, 0.0)) and weight > 0):
            raise ValueError(f"the source {source!r} needs a positive weight at the start, got {start.get(source)}")
    return start


def _check_floor(floor: float) -> None:
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be in (0, 1], so that nothing is dropped, got {floor}")
