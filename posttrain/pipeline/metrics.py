"""Reading metrics.jsonl while it grows and afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.stages.metrics import RESTART, RecordTail


@dataclass
class StageMetrics:
    """What a stage has logged: name -> step -> value.

    `step` is the last one logged, `first` and `last` are the times of the first and last record, seconds since the epoch.
    """

    series: dict[str, dict[int, float]] = field(default_factory=dict)
    step: int = 0
    first: float | None = None
    last: float | None = None

    def latest(self, name: str) -> float | None:
        """The value at the highest step, None when there is none."""
        values = self.series.get(name)
        return values[max(values)] if values else None

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) in the order of the steps."""
        return sorted(self.series.get(name, {}).items())

    def add(self, record: dict[str, Any]) -> None:
        """Take a record in; a later one for the same step replaces the earlier."""
        self.step, self.last = int(record["step"]), float(record["time"])
        self.first = self.last if self.first is None else self.first
        if record["value"] is not None:  # not a finite number when it was logged
            self.series.setdefault(record["name"], {})[self.step] = float(record["value"])


class MetricsTail:
    """Follows the file: every `read` takes in what was appended since the last one."""

    def __init__(self, path: Path) -> None:
        self.stages: dict[str, StageMetrics] = {}
        self._tail = RecordTail(path)

    def read(self) -> dict[str, StageMetrics]:
        """All stages with what they have logged so far; a line that is still being written is left for the next time."""
        for record in self._tail.read():
            if record["name"] == RESTART:
                self.stages[record["stage"]] = StageMetrics()
            else:
                self.stages.setdefault(record["stage"], StageMetrics()).add(record)
        return self.stages


def read_stages(path: Path) -> dict[str, StageMetrics]:
    """What every stage has logged."""
    return MetricsTail(path).read()
