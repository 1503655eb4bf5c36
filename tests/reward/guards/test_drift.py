"""Drift alarms on made-up courses of a run: each kind rings on its own course, and none on a healthy one."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from posttrain.reward.guards.drift import DriftMonitor, StepFacts


def alarms(facts: Callable[[int, np.random.Generator], StepFacts], steps: int = 60, window: int = 10) -> list[tuple[int, str]]:
    random, monitor = np.random.default_rng(0), DriftMonitor(window)
    return [(step, alarm.kind) for step in range(steps) for alarm in monitor.update(facts(step, random))]


def test_a_healthy_run_is_silent() -> None:
    def healthy(step: int, random: np.random.Generator) -> StepFacts:
        return StepFacts(0.3 + 0.01 * step + random.normal(0, 0.01), 20 + step, 0.3 + 0.01 * step + random.normal(0, 0.01), 0.5)

    assert alarms(healthy) == []


def test_noise_alone_rings_rarely() -> None:
    def noise(step: int, random: np.random.Generator) -> StepFacts:
        return StepFacts(*random.normal(0.5, 0.1, 4).tolist())

    # Three standard errors, one side, Student's t with 18 degrees of freedom: 0.4 %. A sliding window makes a few tries of each
    # of the 49 pairs of windows, and there are three kinds.
    assert len(alarms(noise, steps=500)) <= 5


def test_length_that_grows_without_success_rings() -> None:
    def longer(step: int, random: np.random.Generator) -> StepFacts:
        return StepFacts(0.5, 20 + step, 0.5 + random.normal(0, 0.02))

    rung = alarms(longer)
    assert rung[0] == (19, "length") and {kind for _, kind in rung} == {"length"}
    steps = [step for step, _ in rung]
    assert all(later - earlier >= 10 for earlier, later in zip(steps, steps[1:], strict=False)), "a window of silence after each"


def test_where_nothing_is_verified_the_reward_stands_in_for_success() -> None:
    assert alarms(lambda step, _: StepFacts(0.5, 20 + step))[0] == (19, "length")
    assert alarms(lambda step, _: StepFacts(0.5 + 0.01 * step, 20 + step)) == []


def test_a_reward_that_rises_without_the_verifier_rings() -> None:
    rung = alarms(lambda step, random: StepFacts(0.01 * step, 20, 0.5 + random.normal(0, 0.02)))
    assert rung[0] == (19, "reward") and {kind for _, kind in rung} == {"reward"}


def test_growing_uncertainty_rings_and_says_what_was_seen() -> None:
    monitor = DriftMonitor(2)
    found = [monitor.update(StepFacts(0.5, 20, 0.5, spread)) for spread in (0.2, 0.2, 0.4, 0.4)]
    assert found[:3] == [[], [], []]
    (alarm,) = found[3]
    assert alarm.text == "the learned level grows unsure (0.2 to 0.4 between two windows of 2 steps)"
    assert json.loads(json.dumps(alarm.to_json()))["kind"] == "uncertainty"


def test_a_window_of_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 steps"):
        DriftMonitor(1)
