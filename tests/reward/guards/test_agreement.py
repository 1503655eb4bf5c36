"""Agreement between levels against counts of pairs."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.reward.guards.agreement import agreement, auc, kendall_tau

NUMBERS = st.integers(-4, 4).map(float)


@given(st.lists(st.tuples(st.booleans(), NUMBERS), min_size=1, max_size=25))
def test_auc_counts_pairs(answers: list[tuple[bool, float]]) -> None:
    liked = [score for like, score in answers if like]
    others = [score for like, score in answers if not like]
    found = auc(np.array([like for like, _ in answers]), np.array([score for _, score in answers]))
    if not liked or not others:
        assert found is None
        return
    wins = sum((a > b) + 0.5 * (a == b) for a in liked for b in others)
    assert found == pytest.approx(wins / len(liked) / len(others), abs=1e-12)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=25))
def test_tau_counts_concordant_and_discordant_pairs(answers: list[tuple[float, float]]) -> None:
    """tau-b = (C - D) / sqrt((C + D + ties in the first alone) (C + D + ties in the second alone))."""
    pairs = list(itertools.combinations(answers, 2))
    concordant = sum((a - c) * (b - d) > 0 for (a, b), (c, d) in pairs)
    discordant = sum((a - c) * (b - d) < 0 for (a, b), (c, d) in pairs)
    only_first = sum(a == c and b != d for (a, b), (c, d) in pairs)
    only_second = sum(a != c and b == d for (a, b), (c, d) in pairs)
    scale = (concordant + discordant + only_first) * (concordant + discordant + only_second)
    found = kendall_tau(*np.array(answers).T)
    if scale == 0:
        assert found is None
    else:
        assert found == pytest.approx((concordant - discordant) / math.sqrt(scale), abs=1e-12)


def test_within_prompts_and_over_all_are_told_apart() -> None:
    """Within each prompt the learned level is right; it only likes the second, hard prompt better."""
    right = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    learned = [0.3, 0.1, 0.2, 0.9, 0.7, 0.8]
    found = agreement(right, learned, ["easy"] * 3 + ["hard"] * 3)
    assert found.auc_within == 1.0 and found.auc == pytest.approx(6 / 8)
    assert found.groups == 2 and found.kendall == pytest.approx(2 / math.sqrt(2 * 3))  # two of three pairs compare, both agree


def test_the_largest_conflicts_come_first() -> None:
    right = [1.0, 1.0, 0.0, 0.0]
    learned = [0.9, 0.1, 0.2, 0.8]
    found = agreement(right, learned, [0, 0, 1, 1], worst=2)
    # Ranks in [0, 1]: right .75 .75 .25 .25, learned .875 .125 .375 .625.
    assert [(one.index, one.conflict) for one in found.disagreements] == [(1, 0.625), (3, -0.375)]
    assert json.loads(json.dumps(found.to_json()))["disagreements"][0] == {"index": 1, "conflict": 0.625}


def test_levels_that_agree_leave_nothing_to_look_at() -> None:
    found = agreement([0.1, 0.2, 0.7], [1, 5, 9], [0, 0, 0])
    assert found.disagreements == () and found.kendall == 1.0
    alone = agreement([1.0], [0.3], ["p"])
    assert (alone.auc, alone.auc_within, alone.kendall, alone.groups) == (None, None, None, 0)


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [math.nan])])
def test_scores_that_do_not_fit_are_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError):
        agreement(first, second, [0] * len(first))
