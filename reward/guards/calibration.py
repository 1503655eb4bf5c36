"""Calibration of pair preferences: how often the answer that scores higher is the better one, at each confidence.

Source: temperature scaling and the expected calibration error, Guo et al. 2017 (arXiv 1706.04599), on the two-answer case.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEMPERATURES = (0.05, 20.0)
"""Bounds of the fitted temperature: without a mistake among the pairs the likelihood has no maximum inside."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence.

    Attributes:
        confidence: their mean confidence, in [0.5, 1].
        accuracy: share of them whose better answer scores higher.
        count: number of pairs.
    """

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """Calibration of a reward model on held-out pairs.

    Attributes:
        temperature: margins divided by it are the best calibrated.
        ece_before: expected calibration error at temperature 1, in [0, 1].
        ece_after: the same at `temperature`.
        bins: at `temperature`, without empty ones, confidence rising. Together with both errors they are of the half of the
            pairs that the temperature was not fitted on.
        bins_before: at temperature 1.
        count: pairs in the bins.
    """

    temperature: float
    ece_before: float
    ece_after: float
    bins: tuple[Bin, ...]
    bins_before: tuple[Bin, ...]
    count: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def calibrate(margins: Sequence[float], bins: int = 10) -> Calibration:
    """Fit a temperature on one half of the pairs, and measure calibration on the other.

    The halves are drawn, by a fixed seed: sources follow each other in a fixed pattern, and neighbours would split along it.

    The confidence of a pair is sigmoid(|margin| / T), and it is right where the margin is above 0; a margin of 0 is right by
    half. T minimises the mean of softplus(-margin / T) within `TEMPERATURES`.

    Args:
        margins: score(better) - score(worse) of every pair, in logits; at least 2.
        bins: number of bins of equal width on [0.5, 1].

    Raises:
        ValueError: fewer than two pairs, a margin that is not finite, or no bins.
    """
    values = np.asarray(margins, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"calibration needs at least 2 pairs, got {values.size}")
    if not np.isfinite(values).all():
        raise ValueError("a margin is not finite")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    fitted, measured = halves(values.size)
    temperature = fit_temperature(values[fitted])
    held = values[measured]
    before, after = reliability(held, 1.0, bins), reliability(held, temperature, bins)
    return Calibration(temperature, expected_error(before), expected_error(after), after, before, int(held.size))


def halves(count: int) -> tuple[list[int], list[int]]:
    """Places of the pairs that the temperature is fitted on, and of those that calibration is measured on."""
    drawn = random.Random(0).sample(range(count), count)
    return drawn[0::2], drawn[1::2]


def fit_temperature(margins: Array) -> float:
    """The temperature in `TEMPERATURES` at which the pairs are the most likely.

    The loss is convex in 1/T, so golden-section search finds its minimum.
    """
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    golden = (5**0.5 - 1) / 2

    def loss(inverse: float) -> float:
        return float(np.logaddexp(0.0, -margins * inverse).mean())

    for _ in range(100):  # 0.618 ** 100 of the interval is far below rounding
        left, right = high - golden * (high - low), low + golden * (high - low)
        # A flat loss (all right, far out) belongs to the sharper side: equal values move up.
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.clip(2 / (low + high), *TEMPERATURES))


def reliability(margins: Array, temperature: float, bins: int) -> tuple[Bin, ...]:
    """The pairs by confidence in bins of equal width on [0.5, 1], empty ones left out.

    Args:
        margins: [pairs], logits.
        temperature: above 0.
        bins: at least 1.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins) / temperature))
    right = np.where(margins == 0, 0.5, margins > 0)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            found.append(Bin(float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    return tuple(found)


def expected_error(bins: Sequence[Bin]) -> float:
    """Mean of |accuracy - confidence| over the pairs; 0 without any."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / total if total else 0.0
