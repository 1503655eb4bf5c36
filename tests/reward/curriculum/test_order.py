"""Orders keep to their schedule at every place, the control has the same pairs, and competence opens no pair early."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import Bucket, CurriculumSection, PhaseSection
from posttrain.reward.curriculum import BUCKETS, bucket_schedule, competence, plan_order

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(0, 3))
WEIGHTS = st.dictionaries(st.sampled_from(BUCKETS), st.floats(0.05, 5), min_size=1)
PAIRS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(BUCKETS)), min_size=1, max_size=25)


@st.composite
def phases(draw: st.DrawFn) -> dict[str, PhaseSection]:
    later = draw(st.lists(st.integers(1, 10), max_size=3, unique=True).map(sorted))
    return {str(begins): PhaseSection(begins=begins / 10, weights=draw(WEIGHTS)) for begins in [0, *later]}


def target(section: CurriculumSection, present: Sequence[Bucket], name: Bucket, places: int, total: int) -> float:
    """Expected number of `name` among the first places, by the midpoint rule on a fine grid and numpy's interpolation.

    Right only where every phase weighs a bucket that is present.
    """
    begins, shares = [], []
    for phase in section.phases.values():
        kept = {bucket: weight for bucket, weight in phase.weights.items() if bucket in present}
        begins.append(phase.begins)
        shares.append(kept.get(name, 0.0) / sum(kept.values()))
    grid = (np.arange(4000) + 0.5) / 4000 * places / total
    return float(np.interp(grid, begins, shares).mean()) * places


@given(PAIRS, phases(), SIZES)
def test_every_beginning_keeps_to_the_integral_of_the_schedule(
    pairs: list[tuple[float, Bucket]], given_phases: dict[str, PhaseSection], sizes: tuple[int, int, int]
) -> None:
    present = {bucket for _, bucket in pairs}
    section = CurriculumSection(phases=given_phases)
    if not all(present & set(phase.weights) for phase in given_phases.values()):
        return  # such phases have a test of their own
    steps, per_step, seed = sizes
    order = plan_order([d for d, _ in pairs], [b for _, b in pairs], section, steps, per_step, seed)
    assert len(order) == steps * per_step
    for places in {1, len(order) // 2, len(order)} - {0}:
        seen = Counter(pairs[pair][1] for pair in order[:places])
        for bucket in present:
            # The bound is the number of buckets; the grid's error is below 1e-2 of a place.
            expected = target(section, sorted(present), bucket, places, len(order))
            assert abs(seen[bucket] - expected) < len(present) + 0.01


@given(PAIRS, phases(), SIZES)
def test_a_bucket_is_gone_through_before_it_repeats(
    pairs: list[tuple[float, Bucket]], given_phases: dict[str, PhaseSection], sizes: tuple[int, int, int]
) -> None:
    names = [bucket for _, bucket in pairs]
    order = plan_order([d for d, _ in pairs], names, CurriculumSection(phases=given_phases), *sizes)
    for bucket, count in Counter(names).items():
        drawn = [pair for pair in order if names[pair] == bucket]
        for start in range(0, len(drawn), count):
            window = drawn[start : start + count]
            assert len(set(window)) == len(window)


@given(PAIRS, st.sampled_from(["phases", "competence"]), SIZES)
def test_shuffled_has_the_same_draws_and_equal_arguments_give_equal_orders(
    pairs: list[tuple[float, Bucket]], pacing: str, sizes: tuple[int, int, int]
) -> None:
    difficulties, names = [d for d, _ in pairs], [b for _, b in pairs]
    section = CurriculumSection.model_validate({"pacing": pacing})
    order = plan_order(difficulties, names, section, *sizes)
    assert order == plan_order(difficulties, names, section, *sizes)
    control = plan_order(difficulties, names, section.model_copy(update={"shuffled": True}), *sizes)
    assert Counter(control) == Counter(order)


def test_the_control_has_no_trend_and_the_seed_matters() -> None:
    count = 300
    difficulties = [number / count for number in range(count)]
    names = [BUCKETS[3 * number // count] for number in range(count)]
    section = CurriculumSection()
    order = plan_order(difficulties, names, section, 100, 30, 0)
    assert order != plan_order(difficulties, names, section, 100, 30, 1)
    control = plan_order(difficulties, names, section.model_copy(update={"shuffled": True}), 100, 30, 0)
    early, late = (np.mean([difficulties[pair] for pair in part]) for part in (order[:1000], order[-1000:]))
    assert late - early > 0.2
    early, late = (np.mean([difficulties[pair] for pair in part]) for part in (control[:1000], control[-1000:]))
    # A difference of means of 1000 draws with deviation below 0.3 has a standard error of 0.013.
    assert abs(late - early) < 5 * 0.0135


def test_a_bucket_with_one_pair_repeats_it() -> None:
    section = CurriculumSection(phases={"all": PhaseSection(begins=0, weights={"contrastive": 1, "near_tie": 1})})
    order = plan_order([0.1, 0.2, 0.9], ["contrastive", "contrastive", "near_tie"], section, 10, 2, 0)
    assert Counter(order) == {2: 10, 0: 5, 1: 5}


def test_the_default_phases_by_hand() -> None:
    schedule = bucket_schedule(CurriculumSection().phases, dict.fromkeys(BUCKETS, 1))
    assert schedule.at(0.0) == {"contrastive": 0.8, "bridging": 0.2, "near_tie": 0.0, "adversarial": 0.0}
    middle = {"contrastive": 0.5, "bridging": 0.35, "near_tie": 0.1, "adversarial": 0.05}
    assert schedule.at(0.2) == pytest.approx(middle, abs=1e-15)
    assert (
        schedule.at(0.9)
        == schedule.at(1.0)
        == pytest.approx({"contrastive": 0.1, "bridging": 0.2, "near_tie": 0.35, "adversarial": 0.35}, abs=1e-15)
    )


def test_a_bucket_without_pairs_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    found = {
        "easy": PhaseSection(begins=0, weights={"contrastive": 0.6, "bridging": 0.2, "adversarial": 0.2}),
        "hard": PhaseSection(begins=1, weights={"near_tie": 1}),
    }
    with caplog.at_level(logging.WARNING):
        schedule = bucket_schedule(found, {"contrastive": 30, "bridging": 10, "adversarial": 0})
    assert schedule.at(0) == pytest.approx({"contrastive": 0.75, "bridging": 0.25})
    assert schedule.at(1) == pytest.approx({"contrastive": 0.75, "bridging": 0.25})  # by the number of pairs: 30 and 10
    assert [record.getMessage() for record in caplog.records] == [
        "phase 'easy' of the curriculum: no pairs in adversarial; their share goes to the others",
        "phase 'hard' of the curriculum: no pairs in near_tie; all pairs are drawn from instead",
    ]


@given(st.floats(0, 1.5), st.floats(0.01, 1))
def test_competence_grows_from_its_start_to_one_as_a_root(progress: float, initial: float) -> None:
    reached = competence(progress, initial)
    assert initial - 1e-12 <= reached <= 1
    assert competence(0, initial) == pytest.approx(initial, rel=1e-12) and competence(1, initial) == 1.0
    assert competence(progress + 0.01, initial) >= reached
    if progress < 1:
        assert reached**2 == pytest.approx(initial**2 + progress * (1 - initial**2), rel=1e-12)


@given(PAIRS, SIZES, st.floats(0.01, 1), st.floats(0.1, 1), st.floats(0, 1))
def test_competence_never_draws_above_what_is_open(
    pairs: list[tuple[float, Bucket]], sizes: tuple[int, int, int], initial: float, full: float, replay: float
) -> None:
    difficulties = [difficulty for difficulty, _ in pairs]
    section = CurriculumSection(pacing="competence", initial_competence=initial, full_competence=full, replay=replay)
    steps, per_step, seed = sizes
    order = plan_order(difficulties, [b for _, b in pairs], section, steps, per_step, seed)
    assert len(order) == steps * per_step
    ascending = sorted(difficulties)
    for place, pair in enumerate(order):
        time = (place // per_step) / (full * steps)
        opened = min(1.0, math.sqrt(min(time, 1.0) * (1 - initial**2) + initial**2))
        hardest = ascending[max(math.floor(opened * len(pairs) + 1e-9), 1) - 1]
        assert difficulties[pair] <= hardest


def test_competence_opens_every_pair_and_replays_the_easiest_third() -> None:
    count = 90
    difficulties = [number / count for number in range(count)]
    section = CurriculumSection(pacing="competence", initial_competence=0.5, full_competence=0.5, replay=0.0)
    order = plan_order(difficulties, ["bridging"] * count, section, 100, 20, 0)
    assert max(order[:20]) < 45
    assert set(order[1000:]) == set(range(count))
    easiest = np.mean([pair < 30 for pair in order[1000:]])
    # A share of 1000 draws at 1/3 has a standard error of 0.015.
    assert abs(easiest - 1 / 3) < 5 * 0.015
    replayed = section.model_copy(update={"replay": 0.4})
    order = plan_order(difficulties, ["bridging"] * count, replayed, 100, 20, 0)
    assert abs(np.mean([pair < 30 for pair in order[1000:]]) - (0.4 + 0.6 / 3)) < 5 * 0.015
    everything = section.model_copy(update={"replay": 1.0})
    assert max(plan_order(difficulties, ["bridging"] * count, everything, 100, 20, 0)) < 30


def test_equal_difficulties_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan_order([0.5, 0.5], ["bridging", "bridging"], CurriculumSection(), 1, 1, 0)
    assert "all pairs are equally difficult" in caplog.text


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(UserError, match="no pairs"):
        plan_order([], [], CurriculumSection(), 1, 1, 0)
    with pytest.raises(ValueError, match="1 difficulties for 2 buckets"):
        plan_order([0.1], ["bridging", "bridging"], CurriculumSection(), 1, 1, 0)
    with pytest.raises(ValueError, match="positive"):
        plan_order([0.1], ["bridging"], CurriculumSection(), 0, 1, 0)
