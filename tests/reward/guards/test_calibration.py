"""Calibration against margins whose true temperature is known, and bins counted by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.reward.guards.calibration import TEMPERATURES, calibrate, fit_temperature, halves


def drawn(temperature: float, pairs: int = 20_000) -> np.ndarray:
    """Margins of a model that is right with chance sigmoid(|margin| / temperature)."""
    random = np.random.default_rng(7)
    size = np.abs(random.normal(0, 3, pairs))
    right = random.random(pairs) < 1 / (1 + np.exp(-size / temperature))
    return np.where(right, size, -size)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_drawn_margins_is_found_and_mends_the_error(temperature: float) -> None:
    found = calibrate(drawn(temperature).tolist())
    # Fisher information of 1/T from 10,000 pairs gives a relative standard error near 3 %.
    assert found.temperature == pytest.approx(temperature, rel=0.1)
    assert found.ece_after < 0.015
    if temperature != 1.0:
        assert found.ece_before > 0.02 > found.ece_after
    assert sum(one.count for one in found.bins) == found.count == 10_000


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=40))
def test_no_other_temperature_is_more_likely(margins: list[float]) -> None:
    values = np.array(margins)

    def loss(inverse: float) -> float:
        return float(np.logaddexp(0, -values * inverse).mean())

    grid = np.geomspace(1 / TEMPERATURES[1], 1 / TEMPERATURES[0], 500)
    assert loss(1 / fit_temperature(values)) <= min(map(loss, grid)) + 1e-9


def test_bins_by_hand() -> None:
    """One half of the pairs fixes the temperature; the other is counted: confidences 0.6, 0.6, 0.9 and 0.5."""
    six, nine = math.log(1.5), math.log(9)
    margins = [1.0] * 8
    for place, margin in zip(halves(8)[1], (six, -six, nine, 0.0), strict=True):
        margins[place] = margin
    found = calibrate(margins, bins=5)
    assert [(round(one.confidence, 9), one.accuracy, one.count) for one in found.bins_before] == [
        (0.5, 0.5, 1),  # a margin of 0 is right by half
        (0.6, 0.5, 2),
        (0.9, 1.0, 1),
    ]
    assert found.ece_before == pytest.approx((0 + 2 * 0.1 + 0.1) / 4)
    assert found.temperature == pytest.approx(TEMPERATURES[0]), "without a mistake the bound is the best"
    assert json.loads(json.dumps(found.to_json()))["bins"][0].keys() == {"confidence", "accuracy", "count"}


def test_sources_in_turn_are_in_both_halves() -> None:
    """Two sources take turns, one sure and right, one half right: a split by turn would fit on one and measure the other."""
    sure, unsure = drawn(0.5, 10_000), drawn(4.0, 10_000)
    turns = np.stack([sure, unsure], axis=1).ravel()
    found, mixed = calibrate(turns.tolist()), fit_temperature(turns)
    # As above, 10,000 pairs give a relative standard error near 3 %; 0.5 or 4.0 are far away.
    assert found.temperature == pytest.approx(mixed, rel=0.1) and 1.0 < mixed < 3.0
    fitted, measured = halves(1001)
    assert sorted(fitted + measured) == list(range(1001)) and len(fitted) == 501


def test_all_wrong_goes_to_the_other_bound() -> None:
    assert calibrate([-1.0] * 6).temperature == pytest.approx(TEMPERATURES[1])


@pytest.mark.parametrize("margins", [[], [1.0], [1.0, math.nan], [math.inf, 1.0]])
def test_what_cannot_be_calibrated_is_refused(margins: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2 pairs|not finite"):
        calibrate(margins)
