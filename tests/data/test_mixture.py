"""Mixtures keep their proportions and go through each source before repeating it."""

import hashlib
import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.config.schedule import WeightSchedule
from posttrain.data.mixture import sample_mixture, sample_schedule

SOURCES = st.lists(st.tuples(st.integers(1, 20), st.floats(0.01, 10)), min_size=1, max_size=5)


@given(SOURCES, st.integers(0, 150), st.integers(0, 3))
def test_every_beginning_keeps_the_proportions(sources: list[tuple[int, float]], total: int, seed: int) -> None:
    counts = {f"s{i}": count for i, (count, _) in enumerate(sources)}
    weights = {f"s{i}": weight for i, (_, weight) in enumerate(sources)}
    drawn = sample_mixture(counts, weights, total, seed)
    assert len(drawn) == total
    for n in range(0, total + 1, 7):
        seen = Counter(ref for ref, _ in drawn[:n])
        for ref, weight in weights.items():
            assert abs(seen[ref] - n * weight / sum(weights.values())) < len(weights)


@given(SOURCES, st.integers(0, 150), st.integers(0, 3))
def test_a_source_is_gone_through_before_it_repeats(sources: list[tuple[int, float]], total: int, seed: int) -> None:
    counts = {f"s{i}": count for i, (count, _) in enumerate(sources)}
    weights = {f"s{i}": weight for i, (_, weight) in enumerate(sources)}
    drawn = sample_mixture(counts, weights, total, seed)
    for ref, count in counts.items():
        indices = [index for source, index in drawn if source == ref]
        for start in range(0, len(indices), count):
            window = indices[start : start + count]
            assert len(set(window)) == len(window)
            assert all(0 <= index < count for index in window)


def test_a_shorter_list_is_the_beginning_of_a_longer_one_and_the_seed_matters() -> None:
    counts, weights = {"a": 10, "b": 30}, {"a": 1.0, "b": 2.5}
    assert sample_mixture(counts, weights, 50, 7) == sample_mixture(counts, weights, 90, 7)[:50]
    assert sample_mixture(counts, weights, 50, 7) != sample_mixture(counts, weights, 50, 8)


def test_passes_over_a_source_differ_in_order() -> None:
    drawn = [index for _, index in sample_mixture({"a": 20}, {"a": 1.0}, 40, 0)]
    assert drawn[:20] != drawn[20:]
    assert drawn[:20] != list(range(20))


def test_a_source_of_weight_zero_is_never_drawn_and_may_be_empty() -> None:
    assert {ref for ref, _ in sample_mixture({"a": 3, "b": 0}, {"a": 1.0, "b": 0.0}, 30, 0)} == {"a"}


@pytest.mark.parametrize(
    ("counts", "weights", "says"),
    [
        ({"math": 3}, {"maht": 1.0}, "did you mean 'math'"),
        ({"a": 3}, {"a": -1.0}, "at least 0"),
        ({"a": 3}, {"a": float("nan")}, "finite"),
        ({"a": 3}, {"a": 0.0}, "all weights are 0"),
        ({"a": 0}, {"a": 1.0}, "no documents left"),
    ],
)
def test_impossible_mixtures_are_refused(counts: dict[str, int], weights: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        sample_mixture(counts, weights, 5, 0)


def test_lists_are_those_of_earlier_versions() -> None:
    """A run that is resumed, or repeated, draws what it drew before: 200 lists by the hash that they had."""
    lists = []
    for seed in range(200):
        drawn = random.Random(seed)
        number = drawn.randint(1, 6)
        counts = {f"s{i}": drawn.randint(1, 30) for i in range(number)}
        weights = {
            f"s{i}": drawn.choice([drawn.random() * 5 + 0.01, drawn.randint(1, 4), 0.1 * drawn.randint(1, 9)])
            for i in range(number)
        }
        if number > 2:
            weights["s1"] = 0.0
        lists.append(sample_mixture(counts, weights, drawn.randint(0, 300), seed))
    digest = hashlib.sha256(json.dumps(lists).encode()).hexdigest()
    assert digest == "c419f13adf89b918c41788b4751d69e556e080c53c55ec057dcdc62d4c275f7c"


@given(SOURCES, SOURCES, st.integers(1, 150), st.integers(0, 3))
def test_every_beginning_keeps_to_weights_that_move(
    first: list[tuple[int, float]], last: list[tuple[int, float]], total: int, seed: int
) -> None:
    """From `first` to `last` in a straight line: a name's share integrates to a parabola."""
    phases = [{f"s{i}": weight for i, (_, weight) in enumerate(sources)} for sources in (first, last)]
    counts = {f"s{i}": count for sources in (last, first) for i, (count, _) in enumerate(sources)}
    drawn = sample_schedule(counts, WeightSchedule(((0.0, phases[0]), (1.0, phases[1]))), total, seed)
    assert len(drawn) == total
    for n in range(0, total + 1, 7):
        seen = Counter(ref for ref, _ in drawn[:n])
        for ref in counts:
            start, end = (weights.get(ref, 0.0) / sum(weights.values()) for weights in phases)
            assert abs(seen[ref] - (start * n + (end - start) * n**2 / total / 2)) < len(counts)
    for ref, count in counts.items():
        indices = [index for source, index in drawn if source == ref]
        assert all(len(set(indices[i : i + count])) == len(indices[i : i + count]) for i in range(0, len(indices), count))


def test_a_schedule_does_not_draw_what_weighs_nothing_yet() -> None:
    schedule = WeightSchedule(((0.0, {"a": 1.0}), (0.5, {"a": 1.0}), (1.0, {"b": 1.0, "c": 0.0})))
    drawn = [ref for ref, _ in sample_schedule({"a": 3, "b": 2, "c": 0}, schedule, 100, 0)]
    assert set(drawn[:50]) == {"a"} and set(drawn) == {"a", "b"}


def test_impossible_schedules_are_refused() -> None:
    schedule = WeightSchedule(((0.0, {"math": 1.0}), (1.0, {"code": 1.0})))
    with pytest.raises(UserError, match="did you mean 'maths'"):
        sample_schedule({"maths": 3, "code": 3}, schedule, 5, 0)
    with pytest.raises(UserError, match="'code' has no documents left"):
        sample_schedule({"math": 3, "code": 0}, schedule, 5, 0)
