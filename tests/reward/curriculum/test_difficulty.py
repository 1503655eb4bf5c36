"""Difficulties are weighted means of ranks; buckets are their thirds."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import DifficultySection
from posttrain.reward.curriculum import BUCKETS, buckets, disagreement_of, pair_difficulty

Record = dict[str, Any]
NONE = {"margin": 0.0, "disagreement": 0.0, "prompt": 0.0, "length": 0.0, "source": 0.0}
SHARE = st.floats(0, 1)


def only(**weights: float) -> DifficultySection:
    return DifficultySection(**{**NONE, **weights})


def pair(better: int = 3, worse: int = 3, **fields: Any) -> Record:
    """A pair whose answers have so many characters."""
    said = [{"role": "assistant", "content": "x" * length} for length in (better, worse)]
    return {"prompt": [{"role": "user", "content": "?"}], "chosen": [said[0]], "rejected": [said[1]], **fields}


PAIRS = st.lists(
    st.builds(
        lambda better, worse, fields: pair(better, worse, **fields),
        st.integers(1, 30),
        st.integers(1, 30),
        st.fixed_dictionaries(
            {},
            optional={
                "margins": st.dictionaries(st.sampled_from(["correctness", "style"]), SHARE),
                "disagreement": SHARE,
                "success_rate": SHARE,
                "source": st.sampled_from(["a", "b"]),
                "pair_kind": st.sampled_from(["contrastive", "adversarial", "adversarial:longer", None]),
            },
        ),
    ),
    max_size=12,
)
SECTIONS = st.builds(DifficultySection, **{name: st.sampled_from([0.0, 0.25, 1.0, 3.0]) for name in NONE})


def rank_by_counting(values: Sequence[float], value: float) -> float:
    """The definition, pair by pair: the share of the others below, equal ones counting half."""
    below, equal = sum(v < value for v in values), sum(v == value for v in values) - 1
    return (below + equal / 2) / (len(values) - 1)


@given(PAIRS, SECTIONS)
def test_difficulties_are_shares(pairs: list[Record], section: DifficultySection) -> None:
    difficulties = pair_difficulty(pairs, section)
    assert len(difficulties) == len(pairs)
    assert all(0 <= difficulty <= 1 for difficulty in difficulties)


@given(PAIRS, SECTIONS, st.randoms(use_true_random=False))
def test_neither_the_order_of_the_pairs_nor_the_scale_of_the_weights_matters(
    pairs: list[Record], section: DifficultySection, drawn: random.Random
) -> None:
    difficulties = pair_difficulty(pairs, section)
    order = drawn.sample(range(len(pairs)), len(pairs))
    moved = [pairs[i] for i in order]
    assert pair_difficulty(moved, section) == pytest.approx([difficulties[i] for i in order], abs=1e-12)
    doubled = DifficultySection(**{name: 2 * weight for name, weight in section.model_dump().items()})
    assert pair_difficulty(pairs, doubled) == difficulties
    assert buckets(moved, [difficulties[i] for i in order]) == [buckets(pairs, difficulties)[i] for i in order]


@given(st.lists(SHARE, min_size=2, max_size=12).filter(lambda values: len(set(values)) > 1))
def test_each_component_alone_is_its_rank(values: list[float]) -> None:
    hard_when_small = [1 - rank_by_counting(values, value) for value in values]
    hard_when_large = [rank_by_counting(values, value) for value in values]
    margins = [pair(margins={"correctness": value, "style": 0.0}) for value in values]
    assert pair_difficulty(margins, only(margin=1)) == pytest.approx(hard_when_small, abs=1e-15)
    rates = [pair(success_rate=value) for value in values]
    assert pair_difficulty(rates, only(prompt=1)) == pytest.approx(hard_when_small, abs=1e-15)
    disputed = [pair(disagreement=value) for value in values]
    assert pair_difficulty(disputed, only(disagreement=1)) == pytest.approx(hard_when_large, abs=1e-15)
    of_sources = [pair(margins={"style": value}, source=str(number)) for number, value in enumerate(values)]
    assert pair_difficulty(of_sources, only(source=1)) == pytest.approx(hard_when_small, abs=1e-15)


def test_margins_of_a_pair_are_meant_over_all_that_are_named() -> None:
    pairs = [
        pair(margins={"correctness": 1.0, "style": 0.0}),  # 0.5
        pair(margins={"correctness": 0.5, "style": 0.1}),  # 0.3
        pair(margins={"correctness": 0.0}),  # a tie: nothing is harder
        pair(margins={"correctness": 0.6}),  # 0.6
    ]
    assert pair_difficulty(pairs, only(margin=1)) == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 0.0]


@pytest.mark.parametrize("unknown", [{}, {"margins": None}, {"margins": {}}])
def test_an_unknown_margin_has_the_middle_rank(unknown: Record) -> None:
    pairs = [pair(margins={"style": 0.9}), pair(**unknown), pair(margins={"style": 0.1}), pair(margins={"style": 0.2})]
    assert pair_difficulty(pairs, only(margin=1)) == [0.0, 0.5, 1.0, 0.5]


def test_other_components_are_left_out_where_a_pair_lacks_them() -> None:
    pairs = [
        pair(margins={"style": 0.9}, disagreement=0.8),  # margin 0, disagreement 1
        pair(margins={"style": 0.1}),  # margin 1 alone
        pair(margins={"style": 0.5}, disagreement=0.1),  # margin 1/2, disagreement 0
    ]
    assert pair_difficulty(pairs, only(margin=1, disagreement=3)) == [0.75, 1.0, 0.125]


def test_a_component_that_is_equal_everywhere_says_nothing() -> None:
    varied = [pair(margins={"style": value}, success_rate=0.5, source="one", disagreement=0.0) for value in (0.2, 0.4, 0.9)]
    assert pair_difficulty(varied, DifficultySection()) == [1.0, 0.5, 0.0]
    assert pair_difficulty([pair(), pair()], DifficultySection()) == [0.5, 0.5]
    assert pair_difficulty([pair(5, 1, success_rate=0.1)], DifficultySection()) == [0.5]
    assert pair_difficulty([], DifficultySection()) == []


def test_long_answers_and_better_ones_that_are_shorter_are_harder() -> None:
    short, long = pair(5, 5), pair(50, 50)
    low, high = pair_difficulty([short, long], only(length=1))
    assert low < high
    with_length, against_length = pair(20, 10), pair(10, 20)
    low, high = pair_difficulty([with_length, against_length], only(length=1))
    assert low < high
    # Ranks of the sums 10, 30, 30, 100: 0, 1/2, 1/2, 1; of the leads 0, -10, 10, 0: 1/2, 0, 1, 1/2. Summed: 1/2, 1/2, 3/2, 3/2.
    difficulties = pair_difficulty([short, with_length, against_length, long], only(length=1))
    assert difficulties == [pytest.approx(1 / 6), pytest.approx(1 / 6), pytest.approx(5 / 6), pytest.approx(5 / 6)]


def test_a_source_counts_by_the_mean_of_its_known_margins() -> None:
    pairs = [
        pair(source="a", margins={"style": 0.2}),
        pair(source="a", margins={"style": 0.4}),
        pair(source="b", margins={"style": 0.9}),
        pair(source="b"),
        pair(source="c"),
        pair(),
    ]
    # Means 0.3 (twice), 0.9 (twice), unknown (twice): among the four known ones the ranks are 5/6 and 1/6.
    expected = [5 / 6, 5 / 6, 1 / 6, 1 / 6, 0.5, 0.5]
    assert pair_difficulty(pairs, only(source=1)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", True])
@pytest.mark.parametrize(
    "place", [lambda v: {"success_rate": v}, lambda v: {"margins": {"style": v}}, lambda v: {"disagreement": v}]
)
def test_a_value_that_is_no_number_is_refused(place: Callable[[Any], Record], value: Any) -> None:
    with pytest.raises(UserError, match="pair 2: '(success_rate|style|disagreement)' is .*finite number"):
        pair_difficulty([pair(), pair(**place(value))], DifficultySection())


@given(st.lists(SHARE, min_size=1, max_size=40, unique=True))
def test_thirds_differ_in_size_by_one_at_most_and_follow_the_difficulty(difficulties: list[float]) -> None:
    found = buckets([pair()] * len(difficulties), difficulties)
    sizes = [Counter(found)[name] for name in BUCKETS[:3]]
    assert max(sizes) - min(sizes) <= 1
    ascending = [BUCKETS.index(found[i]) for i in np.argsort(difficulties)]
    assert ascending == sorted(ascending)


@given(PAIRS, SECTIONS)
def test_adversarial_pairs_are_told_by_their_note_and_leave_the_thirds_to_the_others(
    pairs: list[Record], section: DifficultySection
) -> None:
    difficulties = pair_difficulty(pairs, section)
    found = buckets(pairs, difficulties)
    noted = [(record.get("pair_kind") or "").startswith("adversarial") for record in pairs]
    assert [bucket == "adversarial" for bucket in found] == noted
    others = [number for number, adversarial in enumerate(noted) if not adversarial]
    alone = buckets([pairs[i] for i in others], [difficulties[i] for i in others])
    assert alone == [found[i] for i in others]
    of_difficulty: dict[float, set[str]] = {}
    for i in others:
        of_difficulty.setdefault(difficulties[i], set()).add(found[i])
    assert all(len(names) == 1 for names in of_difficulty.values())


@pytest.mark.parametrize(
    ("difficulties", "expected"),
    [
        ([0.0], "b"),
        ([0.5] * 4, "bbbb"),
        ([0.1, 0.1, 0.9, 0.9], "ccnn"),
        # The middle of the two equal ones lies on a third's border, which belongs to the middle third.
        ([0.1, 0.1, 0.9], "bbn"),
        ([0.1, 0.9, 0.9], "cbb"),
    ],
)
def test_equally_difficult_pairs_share_the_bucket_of_their_middle(difficulties: list[float], expected: str) -> None:
    found = buckets([pair()] * len(difficulties), difficulties)
    assert "".join(bucket[0] for bucket in found) == expected


@given(st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=6), max_size=5))
def test_disagreement_is_the_deviation_of_the_members_probabilities(scores: list[list[float]]) -> None:
    expected = [2 * np.std(1 / (1 + np.exp(-np.array(members, dtype=np.float64)))) for members in scores]
    # The reference subtracts near-equal probabilities: an error of some 1e-16 in their squares.
    assert disagreement_of(scores) == pytest.approx(expected, abs=1e-7)


def test_disagreement_by_hand() -> None:
    agreed, split, sure, single = disagreement_of([[2.0, 2.0], [800.0, -800.0], [30.0, 60.0], [1.5]])
    assert agreed == single == 0.0 and split == 1.0
    assert sure < 1e-12  # both are sure: the deviation of the margins themselves would be 15
    assert disagreement_of([]) == []


@pytest.mark.parametrize("members", [[], [math.nan], [1.0, math.inf]])
def test_disagreement_without_finite_members_is_refused(members: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        disagreement_of([members])
