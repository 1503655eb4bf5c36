"""Best of n against all subsets, against simulation, and on rewards made to be over-optimised."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.reward.guards.best_of_n import best_of_n, expected_choice, sizes

SCORES = st.integers(-3, 3).map(float)


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=7), st.data())
def test_the_estimate_is_the_mean_over_all_subsets(samples: list[tuple[float, float]], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(samples)))

    def chosen(subset: tuple[tuple[float, float], ...]) -> float:
        best = max(proxy for proxy, _ in subset)
        golds = [gold for proxy, gold in subset if proxy == best]
        return sum(golds) / len(golds)  # a coin decides between equals

    expected = np.mean([chosen(subset) for subset in itertools.combinations(samples, n)])
    proxy, gold = np.array([samples]).transpose(2, 0, 1)
    assert expected_choice(proxy, gold, n)[0] == pytest.approx(expected, abs=1e-12)


def test_sizes_and_divergence() -> None:
    assert sizes(1) == (1,) and sizes(16) == (1, 2, 4, 8, 16) and sizes(12) == (1, 2, 4, 8, 12)
    found = best_of_n([[0.0, 1.0, 2.0, 3.0]] * 2, [[0.0] * 4] * 2)
    assert found.kl == pytest.approx((0.0, math.log(2) - 0.5, math.log(4) - 0.75))
    assert found.proxy[0] == 1.5 and found.proxy[-1] == 3.0
    assert found.onset is None and found.gold == (0.0, 0.0, 0.0)


def curves(fooled: float, prompts: int = 200, samples: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The reward follows gold, but likes a rare kind of bad answer (one in 25) by `fooled`."""
    random = np.random.default_rng(0)
    gold = random.normal(0, 1, (prompts, samples))
    hacked = random.random((prompts, samples)) < 0.04
    return gold + fooled * hacked, np.where(hacked, -2.0, gold)


def test_over_optimisation_begins_where_the_rare_bad_answer_becomes_likely() -> None:
    proxy, gold = curves(fooled=6.0)
    found = best_of_n(proxy, gold)
    assert all(later > earlier for earlier, later in itertools.pairwise(found.proxy)), "the reward itself always rises"
    # With chance 1 - 0.96 ** n a bad answer is among n and wins: gold turns down between n = 8 and 16.
    assert found.onset in (8, 16) and found.gold[-1] < found.gold[0]
    assert all(low <= mean <= high for low, mean, high in zip(found.gold_low, found.gold, found.gold_high, strict=True))
    assert json.loads(json.dumps(found.to_json()))["ns"] == [1, 2, 4, 8, 16, 32, 64]


def test_an_honest_reward_has_no_onset() -> None:
    honest, _ = curves(fooled=0.0)
    found = best_of_n(honest, honest)
    assert found.onset is None and found.gold == found.proxy
    # Expected maximum of 64 normal numbers: 2.384.
    assert found.gold[-1] == pytest.approx(2.38, abs=0.1)


@pytest.mark.parametrize(("errors", "onset"), [(1.5, None), (2.5, 2)])
def test_a_fall_within_a_95_percent_interval_is_no_onset(errors: float, onset: int | None) -> None:
    """Of two samples the reward chooses the second, whose gold is 0: the fall is half of the first one's gold.

    Over 100 prompts half the gold is m + 1 and m - 1 in turn, so its mean m has a standard error of 0.1.
    """
    gold = [[2 * (0.1 * errors + sign), 0.0] for sign in (1, -1) * 50]
    assert best_of_n([[0.0, 1.0]] * 100, gold).onset == onset


def test_the_bootstrap_error_is_that_of_the_mean_and_repeats() -> None:
    random = np.random.default_rng(1)
    gold = random.normal(0, 1, (400, 1))
    found = best_of_n(gold, gold, resamples=2000)
    assert (found.gold_high[0] - found.gold[0]) / 1.96 == pytest.approx(gold.std() / 20, rel=0.1)
    assert best_of_n(gold, gold, resamples=2000) == found
    assert best_of_n(gold, gold, resamples=2000, seed=1) != found


@pytest.mark.parametrize(("proxy", "gold"), [([], []), ([[1.0]], [[1.0, 2.0]]), ([[math.nan]], [[1.0]])])
def test_samples_that_do_not_fit_are_refused(proxy: list[list[float]], gold: list[list[float]]) -> None:
    with pytest.raises(ValueError):
        best_of_n(proxy, gold)
