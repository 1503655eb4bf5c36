"""Drift alarms during online RL: signs that the policy has begun to please the reward instead of getting better."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

WINDOW = 20
"""Steps of a window. The latest window is compared with the one before it, so nothing is said in the first 2 * WINDOW steps."""

GROWTH = 0.1
"""Length or uncertainty grows when the window's mean is above the earlier one's by this share of it."""

ERRORS = 3.0
"""A suspicious rise is also beyond this many standard errors of the difference of the windows' means: windows slide, so a noisy
run is tested at every step."""

SUCCESS_ERRORS = 1.0
"""Success that rises by this many standard errors explains the rest."""


@dataclass(frozen=True)
class StepFacts:
    """What a step of online RL measured, means over its samples.

    Attributes:
        reward: total.
        length: of answers, in tokens.
        accuracy: share that the verifier calls right, None where nothing was verified.
        uncertainty: standard deviation among the learned level's ensemble, None without one.
    """

    reward: float
    length: float
    accuracy: float | None = None
    uncertainty: float | None = None


@dataclass(frozen=True)
class Alarm:
    """A sign of drift.

    Attributes:
        kind: "length", "reward" or "uncertainty".
        text: what was seen, in words.
    """

    kind: str
    text: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class DriftMonitor:
    """Compares the latest window of steps with the window before it.

    - "length": answers grow by `GROWTH` while accuracy does not rise (reward stands in where nothing is verified).
    - "reward": the reward rises while the verified accuracy does not.
    - "uncertainty": the ensemble's spread grows by `GROWTH`: answers leave what the reward model was trained on.

    A rise counts from `ERRORS` standard errors on, success from `SUCCESS_ERRORS`. After an alarm a whole window passes before the
    next of its kind. The windows live in memory: a resumed stage fills them anew.

    Args:
        window: steps of a window, at least 2.
    """

    def __init__(self, window: int = WINDOW) -> None:
        if window < 2:
            raise ValueError(f"a window needs at least 2 steps, got {window}")
        self.window = window
        self._facts: deque[StepFacts] = deque(maxlen=2 * window)
        self._silent: dict[str, int] = {}

    def update(self, facts: StepFacts) -> list[Alarm]:
        """Take in a step; returns its alarms, usually none."""
        self._facts.append(facts)
        self._silent = {kind: left - 1 for kind, left in self._silent.items() if left > 1}
        if len(self._facts) < 2 * self.window:
            return []
        alarms = [alarm for alarm in self._signs() if alarm.kind not in self._silent]
        self._silent |= {alarm.kind: self.window for alarm in alarms}
        return alarms

    def _signs(self) -> list[Alarm]:
        length, reward = self._change("length"), self._change("reward")
        accuracy, uncertainty = self._change("accuracy"), self._change("uncertainty")
        assert length is not None and reward is not None
        signs = []
        success, name = (reward, "reward") if accuracy is None else (accuracy, "verified accuracy")
        if length.grows and not success.succeeds:
            signs.append(Alarm("length", f"answers grow ({length}) while {name} does not ({success})"))
        if accuracy is not None and reward.rises and not accuracy.succeeds:
            signs.append(Alarm("reward", f"the reward rises ({reward}) while verified accuracy does not ({accuracy})"))
        if uncertainty is not None and uncertainty.grows:
            signs.append(Alarm("uncertainty", f"the learned level grows unsure ({uncertainty})"))
        return signs

    def _change(self, name: str) -> _Change | None:
        values = [getattr(facts, name) for facts in self._facts]
        if any(value is None for value in values):
            return None
        before, latest = np.array(values[: self.window]), np.array(values[self.window :])
        error = ((before.var(ddof=1) + latest.var(ddof=1)) / self.window) ** 0.5
        return _Change(float(before.mean()), float(latest.mean()), float(error), self.window)


@dataclass(frozen=True)
class _Change:
    before: float
    latest: float
    error: float
    window: int

    @property
    def rises(self) -> bool:
        return self.latest - self.before > ERRORS * self.error

    @property
    def succeeds(self) -> bool:
        return self.latest - self.before > SUCCESS_ERRORS * self.error

    @property
    def grows(self) -> bool:
        return self.rises and self.latest > (1 + GROWTH) * self.before

    def __str__(self) -> str:
        return f"{self.before:.3g} to {self.latest:.3g} between two windows of {self.window} steps"
