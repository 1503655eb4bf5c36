"""Numbers and mixture weights that move over a run: pure functions of progress, which JSON can carry.

Progress is whatever grows: a share of a stage's steps, steps, or tokens. MiniMax-01 moves the sampling weights of its sources
linearly from the old distribution to the new one when it lengthens the context (arXiv 2501.08313, section 4.2). The curriculum of
the reward model moves its buckets by the same rule. A learning rate has its own function (`posttrain.stages.schedule`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from posttrain.config.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """A number that moves linearly from point to point, and stays before the first and after the last.

    Attributes:
        points: (progress, value), progress strictly ascending; a single point is a constant.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """Raises: UserError: no point, a number that is not finite, or progress that does not ascend."""
        if not self.points:
            raise UserError("a schedule has no points", instead="give at least one")
        for number in (number for point in self.points for number in point):
            if not math.isfinite(number):
                raise UserError(f"a schedule holds {number}", instead="should be a finite number")
        for (earlier, _), (later, _) in pairwise(self.points):
            if later <= earlier:
                raise UserError(f"a schedule goes from {earlier:g} to {later:g}", instead="put its points in ascending order")

    def at(self, progress: float) -> float:
        """The value at `progress`."""
        after = bisect_right(self._places, progress)
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]
        (start, low), (stop, high) = self.points[after - 1], self.points[after]
        share = (progress - start) / (stop - start)
        return low * (1 - share) + high * share

    def integral(self, start: float, stop: float) -> float:
        """The signed area below the value from `start` to `stop`, exact up to rounding."""
        return self._area(stop) - self._area(start)

    def _area(self, progress: float) -> float:
        """The area from the first point to `progress`: whole pieces, then a trapezium."""
        piece = max(bisect_right(self._places, progress) - 1, 0)
        start, value = self.points[piece]
        return self._areas[piece] + (progress - start) * (value + self.at(progress)) / 2

    @cached_property
    def _places(self) -> tuple[float, ...]:
        return tuple(place for place, _ in self.points)

    @cached_property
    def _areas(self) -> tuple[float, ...]:
        """The area from the first point to each."""
        pieces = [(right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(self.points)]
        return tuple(accumulate(pieces, initial=0.0))

    def to_json(self) -> list[list[float]]:
        """The points as JSON values."""
        return [list(point) for point in self.points]

    @classmethod
    def from_json(cls, value: list[list[float]]) -> Schedule:
        """The schedule that `to_json` wrote."""
        return cls(tuple((place, number) for place, number in value))


@dataclass(frozen=True)
class WeightSchedule:
    """Weights of a mixture that move linearly from phase to phase, each phase's weights taken relative to their sum.

    A phase's weights are reached where it begins; the last phase's stay. To hold weights for a while, write the phase twice.

    Attributes:
        phases: (progress at which it begins, weights by name), strictly ascending; a name that a phase leaves out weighs 0 there.
    """

    phases: tuple[tuple[float, Mapping[str, float]], ...]

    def __post_init__(self) -> None:
        """Raises: UserError: no phase, phases that do not ascend, or weights that are negative, infinite or all 0."""
        for _, weights in self.phases:
            for name, weight in weights.items():
                if not 0 <= weight < math.inf:
                    raise UserError(f"weight of '{name}' is {weight}", instead="should be a finite number of at least 0")
            if not 0 < (total := sum(weights.values())) < math.inf:
                raise UserError(f"the weights of a phase sum to {total:g}", instead="give at least one a weight above 0")
        if not self.phases:
            raise UserError("a schedule of weights has no phases", instead="give at least one")
        _ = self.schedules  # sees that the phases ascend

    @cached_property
    def schedules(self) -> dict[str, Schedule]:
        """The share of each name as a schedule of its own, in the order in which the phases name them."""
        names = dict.fromkeys(name for _, weights in self.phases for name in weights)
        return {
            name: Schedule(tuple((begins, weights.get(name, 0.0) / sum(weights.values())) for begins, weights in self.phases))
            for name in names
        }

    def at(self, progress: float) -> dict[str, float]:
        """The share of each name at `progress`; they sum to 1."""
        return {name: schedule.at(progress) for name, schedule in self.schedules.items()}

    def to_json(self) -> list[dict[str, Any]]:
        """The phases as JSON values."""
        return [{"begins": begins, "weights": dict(weights)} for begins, weights in self.phases]

    @classmethod
    def from_json(cls, value: list[dict[str, Any]]) -> WeightSchedule:
        """The schedule that `to_json` wrote."""
        return cls(tuple((phase["begins"], phase["weights"]) for phase in value))
