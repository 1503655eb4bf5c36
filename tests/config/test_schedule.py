"""Schedules move linearly between their points, keep a mixture's sum, and survive JSON."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.config.schedule import Schedule, WeightSchedule

PLACES = st.lists(st.integers(-50, 50), min_size=1, max_size=6, unique=True).map(sorted)
VALUES = st.floats(-10, 10)
WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.floats(0, 5), min_size=1).filter(lambda w: sum(w.values()) > 0.01)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    return Schedule(tuple((place / 10, draw(VALUES)) for place in draw(PLACES)))


@st.composite
def weight_schedules(draw: st.DrawFn) -> WeightSchedule:
    return WeightSchedule(tuple((place / 10, draw(WEIGHTS)) for place in draw(PLACES)))


@given(schedules(), st.floats(-8, 8))
def test_the_value_is_that_of_linear_interpolation(schedule: Schedule, progress: float) -> None:
    places, values = zip(*schedule.points, strict=True)
    # Eight roundings of numbers up to 10, and progress differences divided by at least 0.1.
    assert schedule.at(progress) == pytest.approx(np.interp(progress, places, values), abs=1e-12)


@given(schedules())
def test_points_are_met_exactly_and_the_ends_stay(schedule: Schedule) -> None:
    for place, value in schedule.points:
        assert schedule.at(place) == value
    assert schedule.at(-1e9) == schedule.points[0][1] and schedule.at(1e9) == schedule.points[-1][1]


@given(schedules(), st.floats(-6, 6))
def test_the_value_has_no_jumps(schedule: Schedule, progress: float) -> None:
    # Points are at least 0.1 apart and values at most 20, so no slope exceeds 200.
    assert abs(schedule.at(progress + 1e-6) - schedule.at(progress)) <= 200e-6 * (1 + 1e-6)


@given(schedules(), st.integers(-70, 70), st.integers(-70, 70))
def test_the_integral_is_that_of_the_trapezium_rule_on_a_grid_that_holds_all_points(schedule: Schedule, a: int, b: int) -> None:
    start, stop = min(a, b), max(a, b)
    grid = np.arange(start, stop + 1) / 10
    exact = float(np.trapezoid([schedule.at(place) for place in grid], grid))
    assert schedule.integral(start / 10, stop / 10) == pytest.approx(exact, abs=1e-10)
    assert schedule.integral(stop / 10, start / 10) == pytest.approx(-exact, abs=1e-10)


def test_an_integral_by_hand() -> None:
    ramp = Schedule(((0.0, 0.0), (1.0, 2.0)))
    assert ramp.integral(0, 1) == 1.0 and ramp.integral(0, 0.5) == 0.25 and ramp.integral(-3, 0) == 0.0
    assert ramp.integral(1, 3) == 4.0
    assert Schedule(((5.0, 3.0),)).integral(0, 10) == 30.0


@given(weight_schedules(), st.floats(-8, 8))
def test_shares_sum_to_one_and_are_none_below_zero(schedule: WeightSchedule, progress: float) -> None:
    shares = schedule.at(progress)
    assert math.fsum(shares.values()) == pytest.approx(1.0, abs=1e-12)
    assert min(shares.values()) >= 0


@given(weight_schedules())
def test_a_phase_has_its_own_weights_where_it_begins(schedule: WeightSchedule) -> None:
    for begins, weights in schedule.phases:
        total = sum(Fraction(weight) for weight in weights.values())
        for name, share in schedule.at(begins).items():
            assert share == pytest.approx(float(Fraction(weights.get(name, 0)) / total), abs=1e-15)


@given(schedules(), weight_schedules())
def test_json_gives_an_equal_schedule(schedule: Schedule, weights: WeightSchedule) -> None:
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    again = WeightSchedule.from_json(json.loads(json.dumps(weights.to_json())))
    assert again == weights and again.at(0.3) == weights.at(0.3)


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ((), "no points"),
        (((0.0, 1.0), (0.0, 2.0)), "from 0 to 0"),
        (((1.0, 1.0), (0.5, 2.0)), "ascending"),
        (((0.0, math.nan),), "holds nan"),
        (((math.inf, 1.0),), "holds inf"),
    ],
)
def test_an_impossible_schedule_is_refused(points: tuple[tuple[float, float], ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Schedule(points)


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ((), "no phases"),
        (((0.0, {"a": 0.0}),), "sum to 0"),
        (((0.0, {}),), "sum to 0"),
        (((0.0, {"a": -1.0, "b": 2.0}),), "weight of 'a' is -1"),
        (((0.0, {"a": math.nan}),), "weight of 'a' is nan"),
        (((0.0, {"a": 1e308, "b": 1e308}),), "sum to inf"),
        (((0.5, {"a": 1.0}), (0.5, {"a": 1.0})), "from 0.5 to 0.5"),
    ],
)
def test_an_impossible_schedule_of_weights_is_refused(phases: tuple[tuple[float, dict[str, float]], ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        WeightSchedule(phases)
