"""Agreement between two levels on the same answers, and the answers on which they contradict each other the most."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Disagreement:
    """An answer worth a human's look.

    Attributes:
        index: of the answer, in the order given.
        conflict: rank by the first level minus rank by the second, both in [0, 1]; above 0 the first one likes it better.
    """

    index: int
    conflict: float


@dataclass(frozen=True)
class Agreement:
    """How far two levels order answers alike; None where nothing can be compared.

    Attributes:
        auc: chance that the second level scores an answer which the first likes (above the middle of its scale) higher
            than one which it does not; over all answers. 0.5 is no agreement, ties count half.
        auc_within: the same within prompts, averaged over those that have both kinds. This is what online RL uses.
        kendall: Kendall's tau-b within prompts, averaged over those in which both levels vary.
        groups: prompts in `kendall`.
        disagreements: the largest conflicts, largest first.
    """

    auc: float | None
    auc_within: float | None
    kendall: float | None
    groups: int
    disagreements: tuple[Disagreement, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def agreement(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable], *, middle: float = 0.5, worst: int = 20
) -> Agreement:
    """Compare two levels, usually the verifier's score and the learned one.

    Args:
        first: score of each answer by the level that is trusted more.
        second: score of the same answers by the other level, on any scale.
        groups: prompt of each answer.
        middle: an answer is liked by the first level from here on.
        worst: number of disagreements returned; answers on which the levels do not differ are never among them.

    Raises:
        ValueError: numbers of different count, none, or one that is not finite.
    """
    ours, theirs = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not len(ours) == len(theirs) == len(groups) or not len(ours):
        raise ValueError(f"{len(ours)} and {len(theirs)} scores of {len(groups)} answers; as many are needed, at least one")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("a score is not finite")
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    inside = [(ours[indices], theirs[indices]) for indices in members.values()]
    taus = [tau for one, other in inside if (tau := kendall_tau(one, other)) is not None]
    aucs = [found for one, other in inside if (found := auc(one >= middle, other)) is not None]
    conflict = _ranks(ours) - _ranks(theirs)
    order = sorted(range(len(ours)), key=lambda index: (-abs(conflict[index]), index))
    return Agreement(
        auc(ours >= middle, theirs),
        float(np.mean(aucs)) if aucs else None,
        float(np.mean(taus)) if taus else None,
        len(taus),
        tuple(Disagreement(index, float(conflict[index])) for index in order[:worst] if conflict[index] != 0),
    )


def auc(liked: NDArray[np.bool_], scores: Array) -> float | None:
    """Chance that a liked answer scores above another, ties by half; None where one kind is missing.

    Args:
        liked: [answers].
        scores: [answers].
    """
    positive, negative = int(liked.sum()), int((~liked).sum())
    if not positive or not negative:
        return None
    # Mann-Whitney: the ranks' sum counts the answers below each liked one.
    return float((_places(scores)[liked].sum() - positive * (positive + 1) / 2) / (positive * negative))


def kendall_tau(first: Array, second: Array) -> float | None:
    """Kendall's tau-b of two orders of the same answers, None where one of them is constant.

    Args:
        first, second: [answers], a prompt's; time grows with the square of their number.
    """
    rows, columns = np.triu_indices(len(first), 1)
    one, other = np.sign(first[rows] - first[columns]), np.sign(second[rows] - second[columns])
    scale = float((one != 0).sum()) * float((other != 0).sum())
    return float((one * other).sum() / scale**0.5) if scale > 0 else None


def _places(values: Array) -> Array:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[place], dtype=np.float64)


def _ranks(values: Array) -> Array:
    """Ranks in [0, 1]; 0.5 for a single answer."""
    return (_places(values) - 0.5) / len(values)
