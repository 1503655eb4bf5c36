"""How difficult a pair is to learn, and the bucket that it falls into.

Curricula over preference pairs order them by how far apart the two answers are (Curri-DPO, arXiv 2403.07230), by that and the
prompt's difficulty (2D-Curri-DPO, 2504.07856), or take label noise and model capacity in as well (Curriculum-RLAIF, 2505.20075).
Here all of these are components of one number. They have no common unit, so each counts as a rank among the stage's pairs.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import Bucket, DifficultySection

Record = Mapping[str, Any]

BUCKETS: tuple[Bucket, ...] = get_args(Bucket)
"""Names of the buckets, from easy to hard."""

_MIDDLE = 0.5  # rank of a pair that nothing is known about


def pair_difficulty(records: Sequence[Record], weights: DifficultySection) -> list[float]:
    """Difficulty of each pair among the others, the weighted mean of its components' ranks.

    Components, hard when: `margin` is small (mean of the named margins; an unknown one has the middle rank),
    `disagreement` of an ensemble is large, `success_rate` of the prompt is low, the answers are long and the better one is
    the shorter (a preference against what length suggests; both halves weigh the same), the mean margin of `source` is small.

    A component that a pair lacks is left out there, and the others' weights are taken relative to their sum. A component in
    which all pairs are equal says nothing and is left out everywhere. A pair without any component gets 0.5.

    Args:
        records: pairs with `chosen` and `rejected` (messages) and any of `margins` (by dimension, in [0, 1]), `disagreement`,
            `success_rate` and `source`. The ranks are among these, so pairs are comparable within one call only.
        weights: weight of each component.

    Returns:
        A number in [0, 1] for each pair, 1 for the most difficult.

    Raises:
        UserError: a margin, disagreement or success rate that is no finite number.
    """
    margins = [_margin(record, number) for number, record in enumerate(records)]
    components = [
        (weights.margin, _unknown_as_middle(_ranks(_negated(margins)))),
        (weights.disagreement, _ranks([_number(record, "disagreement", number) for number, record in enumerate(records)])),
        (weights.prompt, _ranks(_negated([_number(record, "success_rate", number) for number, record in enumerate(records)]))),
        (weights.length, _length_ranks(records)),
        (weights.source, _ranks(_negated(_source_margins(records, margins)))),
    ]
    return [_mean([(weight, ranks[number]) for weight, ranks in components]) for number in range(len(records))]


def buckets(records: Sequence[Record], difficulties: Sequence[float]) -> list[Bucket]:
    """The bucket of each pair: `adversarial` by the note of who made it, the others by thirds of their difficulty.

    Adversarial pairs are made to mislead, by length or tone, and are told by their `pair_kind` ("adversarial" or
    "adversarial:..."): how far apart the two answers are does not show it. The other pairs are split among themselves:
    `contrastive` is the easiest third, `bridging` the middle, `near_tie` the hardest. Equally difficult pairs share a bucket
    (that of their middle rank), so the thirds are exact only where difficulties differ, and the order of the pairs is
    immaterial.

    Args:
        records: the pairs.
        difficulties: their difficulties, in the same order.
    """
    noted = [str(record.get("pair_kind") or "").startswith("adversarial") for record in records]
    plain = sorted(difficulty for difficulty, adversarial in zip(difficulties, noted, strict=True) if not adversarial)
    return [
        "adversarial" if adversarial else _third(plain, difficulty)
        for difficulty, adversarial in zip(difficulties, noted, strict=True)
    ]


def disagreement_of(scores: Sequence[Sequence[float]]) -> list[float]:
    """How much an ensemble disagrees about each pair, for the pairs' field `disagreement`.

    Twice the standard deviation over the members of sigmoid(margin), each member's probability that the better answer is
    better. Unlike the deviation of the margins themselves, it does not call a pair disputed when all members are sure of it,
    one more than another; unlike a count of votes, it has more values than members. It is 0 for a single member.

    Args:
        scores: for each pair, each member's score of the better answer less that of the worse one (logits).

    Returns:
        A number in [0, 1] for each pair, 1 where one half of the members is sure and the other sure of the opposite.

    Raises:
        ValueError: a pair without members, or a score that is not finite.
    """
    return [_spread(members) for members in scores]


def _spread(margins: Sequence[float]) -> float:
    if not margins or not all(math.isfinite(margin) for margin in margins):
        raise ValueError(f"an ensemble's margins should be finite numbers, at least one: {list(margins)}")
    # tanh does not overflow: sigmoid(m) = (1 + tanh(m / 2)) / 2, and twice its deviation is that of tanh(m / 2).
    votes = [math.tanh(margin / 2) for margin in margins]
    mean = math.fsum(votes) / len(votes)
    return min(math.sqrt(math.fsum((vote - mean) ** 2 for vote in votes) / len(votes)), 1.0)


def _third(ascending: Sequence[float], difficulty: float) -> Bucket:
    below, upto = bisect_left(ascending, difficulty), bisect_right(ascending, difficulty)
    middle = 3 * (below + upto)  # six times the number of pairs up to the middle of the equal ones: whole numbers compare exactly
    if middle < 2 * len(ascending):
        return "contrastive"
    return "bridging" if middle <= 4 * len(ascending) else "near_tie"


def _margin(record: Record, number: int) -> float | None:
    """Mean of the named margins, those of 0 among them: how far apart the answers are in all. None where none is known.

    A pair that differs in one dimension alone, however much, is harder than one that differs in all of them.
    """
    margins: Record = record.get("margins") or {}
    known = [margin for target in margins if (margin := _number(margins, target, number)) is not None]
    return math.fsum(known) / len(known) if known else None


def _number(record: Record, field: str, number: int) -> float | None:
    value = record.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"'{field}' is {value!r}", where=f"pair {number + 1}", instead="should be a finite number")
    return float(value)


def _source_margins(records: Sequence[Record], margins: Sequence[float | None]) -> list[float | None]:
    known: defaultdict[str, list[float]] = defaultdict(list)
    for record, margin in zip(records, margins, strict=True):
        if margin is not None and record.get("source") is not None:
            known[record["source"]].append(margin)
    means = {source: math.fsum(values) / len(values) for source, values in known.items()}
    return [means.get(record.get("source", "")) for record in records]


def _length_ranks(records: Sequence[Record]) -> list[float | None]:
    """Rank of two ranks' sum: of both answers' characters together, and of those by which the worse one is longer."""
    better, worse = ([_characters(record[side]) for record in records] for side in ("chosen", "rejected"))
    long = _ranks([float(b + w) for b, w in zip(better, worse, strict=True)])
    misleading = _ranks([float(w - b) for b, w in zip(better, worse, strict=True)])
    return _ranks([(a or 0.0) + (b or 0.0) for a, b in zip(long, misleading, strict=True)])


def _characters(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)


def _negated(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else -value for value in values]


def _ranks(values: Sequence[float | None]) -> list[float | None]:
    """Rank in [0, 1] of each known value among the known ones, equal ones sharing their middle; all None if none differ."""
    known = sorted(value for value in values if value is not None)
    if not known or known[0] == known[-1]:
        return [None] * len(values)
    last = len(known) - 1
    return [None if v is None else (bisect_left(known, v) + bisect_right(known, v) - 1) / (2 * last) for v in values]


def _unknown_as_middle(ranks: Sequence[float | None]) -> list[float | None]:
    """An unknown rank becomes the middle, unless the component says nothing about any pair."""
    if all(rank is None for rank in ranks):
        return list(ranks)
    return [_MIDDLE if rank is None else rank for rank in ranks]


def _mean(parts: Sequence[tuple[float, float | None]]) -> float:
    """Weighted mean of the known parts."""
    known = [(weight, rank) for weight, rank in parts if rank is not None and weight > 0]
    if not known:
        return _MIDDLE
    total = math.fsum(weight for weight, _ in known)
    return min(math.fsum(weight / total * rank for weight, rank in known), 1.0)
