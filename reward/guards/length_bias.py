"""Length bias: how far a reward takes the longer answer for the better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LengthBias:
    """Length bias on held-out pairs; None where no pair can tell.

    Attributes:
        correlation: Pearson's, of the margin of score and the margin of length, better minus worse in both.
        slope: score a token of length, by least squares of one margin on the other. The constant of the fit is what the
            reward sees in the better answers at equal length, so pairs in which the better answer is usually the longer
            one do not count as bias by themselves.
        share_longer_preferred: share of the pairs of unequal length in which the longer answer scores higher.
        accuracy_longer_better: share of right pairs among those whose better answer is the longer one.
        accuracy_shorter_better: the same where it is the shorter one; well below the other is a bias.
        accuracy: share of right pairs.
        corrected_accuracy: share of right pairs once `slope` times length is taken off every score. The slope is fitted
            on the same pairs.
        count: pairs.
    """

    correlation: float | None
    slope: float
    share_longer_preferred: float | None
    accuracy_longer_better: float | None
    accuracy_shorter_better: float | None
    accuracy: float
    corrected_accuracy: float
    count: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def length_bias(score_margins: Sequence[float], length_margins: Sequence[float]) -> LengthBias:
    """Measure the bias of a reward on pairs.

    Args:
        score_margins: score(better) - score(worse) of every pair.
        length_margins: length(better) - length(worse) of every pair, in tokens.

    Raises:
        ValueError: no pairs, numbers of different count, or one that is not finite.
    """
    scores = np.asarray(score_margins, dtype=np.float64)
    lengths = np.asarray(length_margins, dtype=np.float64)
    if scores.shape != lengths.shape or scores.ndim != 1 or not scores.size:
        raise ValueError(f"{scores.size} score margins and {lengths.size} length margins; as many are needed, at least one")
    if not (np.isfinite(scores).all() and np.isfinite(lengths).all()):
        raise ValueError("a margin is not finite")
    deviation = lengths - lengths.mean()
    spread = float((deviation**2).sum())
    shared = float((deviation * (scores - scores.mean())).sum())
    of_scores = float(((scores - scores.mean()) ** 2).sum())
    slope = shared / spread if spread > 0 else 0.0
    unequal = lengths != 0
    return LengthBias(
        correlation=shared / (spread * of_scores) ** 0.5 if spread * of_scores > 0 else None,
        slope=slope,
        share_longer_preferred=_right(scores[unequal] * np.sign(lengths[unequal])),
        accuracy_longer_better=_right(scores[lengths > 0]),
        accuracy_shorter_better=_right(scores[lengths < 0]),
        accuracy=_right(scores) or 0.0,
        corrected_accuracy=_right(scores - slope * lengths) or 0.0,
        count=int(scores.size),
    )


def _right(margins: Array) -> float | None:
    """Share of margins above 0, those of 0 by half; None without any."""
    return float(((margins > 0) + 0.5 * (margins == 0)).mean()) if margins.size else None
