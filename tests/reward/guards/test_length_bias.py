"""Length bias against scores made with a known one, and against the standard library's statistics."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.reward.guards.length_bias import length_bias

PAIRS = st.lists(st.tuples(st.floats(-10, 10), st.integers(-50, 50)), min_size=3, max_size=30)


def biased(slope: float, pairs: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    lengths = random.integers(-40, 41, pairs).astype(float)
    return 0.5 + slope * lengths + random.normal(0, 1, pairs), lengths


def test_a_known_slope_is_found_and_taken_out() -> None:
    scores, lengths = biased(0.1)
    found = length_bias(scores.tolist(), lengths.tolist())
    assert found.slope == pytest.approx(0.1, abs=0.003)  # standard error 1 / (23 * sqrt(4000)) = 0.0007
    longer, shorter, preferred = found.accuracy_longer_better, found.accuracy_shorter_better, found.share_longer_preferred
    assert longer is not None and shorter is not None and preferred is not None
    assert longer > 0.9 > 0.35 > shorter and preferred > 0.8
    # What is left is a mean margin of 0.5 with standard deviation 1.
    assert (
        found.corrected_accuracy == pytest.approx(statistics.NormalDist().cdf(0.5), abs=0.03)
        and found.accuracy < found.corrected_accuracy
    )


def test_without_a_bias_little_is_found() -> None:
    scores, lengths = biased(0.0)
    found = length_bias(scores.tolist(), lengths.tolist())
    assert abs(found.slope) < 0.003 and found.correlation == pytest.approx(0.0, abs=0.05)
    assert found.accuracy_longer_better == pytest.approx(found.accuracy_shorter_better, abs=0.05)
    assert found.share_longer_preferred == pytest.approx(0.5, abs=0.03)


@given(PAIRS)
def test_correlation_and_slope_are_the_standard_librarys(pairs: list[tuple[float, int]]) -> None:
    scores, lengths = [score for score, _ in pairs], [length for _, length in pairs]
    found = length_bias(scores, lengths)
    if np.ptp(lengths) == 0:
        assert found.slope == 0.0 and found.correlation is None
        return
    assert found.slope == pytest.approx(statistics.linear_regression(lengths, scores).slope, abs=1e-9)
    if np.std(scores) > 1e-6:
        assert found.correlation == pytest.approx(statistics.correlation(lengths, scores), abs=1e-6)


def test_by_hand() -> None:
    found = length_bias([1.0, -1.0, 2.0, 0.0], [5, -5, -5, 0])
    assert found.accuracy == 0.625 and found.accuracy_longer_better == 1.0 and found.accuracy_shorter_better == 0.5
    assert found.share_longer_preferred == pytest.approx(2 / 3)
    assert json.loads(json.dumps(found.to_json()))["count"] == 4
    alone = length_bias([1.0], [0])
    assert (alone.correlation, alone.accuracy_longer_better, alone.share_longer_preferred) == (None, None, None)


@pytest.mark.parametrize(("scores", "lengths"), [([], []), ([1.0], []), ([math.nan], [1.0])])
def test_numbers_that_do_not_fit_are_refused(scores: list[float], lengths: list[float]) -> None:
    with pytest.raises(ValueError):
        length_bias(scores, lengths)
