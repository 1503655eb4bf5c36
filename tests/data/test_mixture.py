"""Mixtures keep their proportions and go through each source before repeating it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.data.mixture import sample_mixture

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
