"""Reading metrics.jsonl while it grows and afterwards."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESTART = "restart"
"""Name of the record that ends what a stage logged before: it starts again from its first step."""


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
        self.path = path
        self.stages: dict[str, StageMetrics] = {}
        self._offset = 0
        self._rest = b""

    def read(self) -> dict[str, StageMetrics]:
        """All stages with what they have logged so far; a line that is still being written is left for the next time."""
        for record in self._records():
            if record["name"] == RESTART:
                self.stages[record["stage"]] = StageMetrics()
            else:
                self.stages.setdefault(record["stage"], StageMetrics()).add(record)
        return self.stages

    def _records(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            if line.strip():
                yield json.loads(line)


def read_stages(path: Path) -> dict[str, StageMetrics]:
    """What every stage has logged."""
    return MetricsTail(path).read()


def log_restart(path: Path, stage: str) -> None:
    """Note that a stage starts again from its first step."""
    line = json.dumps({"step": 0, "stage": stage, "name": RESTART, "value": 0.0, "time": time.time()}) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)
