"""Intervals around shares and means, for tables and pictures; all at 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054
"""Quantile of the normal distribution for a two-sided interval of 95 %."""

_LARGEST_DRAW = 1_000_000
"""Numbers that the bootstrap draws at once, unless a single resample is larger."""


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): inside [0, 1], and sensible for few trials.

    Args:
        share: of successes, in [0, 1].
        count: trials; none gives (0, 1).
    """
    if count <= 0:
        return 0.0, 1.0
    square = Z * Z / count
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def bootstrap_mean(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap of a mean (Efron 1979).

    Args:
        values: independent observations, at least one.
        seed: of the resampling; the same one gives the same interval.
        draws: resamples.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of no values has no interval")
    found = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed)
    rows = max(1, _LARGEST_DRAW // len(found))  # so many resamples at a time: of many values a matrix of all would not fit
    sizes = [min(rows, draws - start) for start in range(0, draws, rows)]
    means = np.concatenate([found[drawn.integers(len(found), size=(size, len(found)))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
