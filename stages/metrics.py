"""The run's measurements: one append-only file of JSON lines that a reader may follow while it grows."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends records of one stage to metrics.jsonl."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line a value: {"step", "stage", "name", "value", "time"}; time in seconds since the epoch.

        A line is one write to a file opened for appending, so lines of several writers do not mix. A value that is not
        finite is written as null, which keeps the line valid JSON.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            for name, value in values.items():
                number = float(value)
                record = {
                    "step": step,
                    "stage": self.stage,
                    "name": name,
                    "value": number if math.isfinite(number) else None,
                    "time": time.time(),
                }
                os.write(handle, (json.dumps(record) + "\n").encode())
        finally:
            os.close(handle)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file, in order; of several with the same stage, name and step the last one counts.

    A resumed stage logs the steps after its checkpoint again. A last line that is still being written is left out.
    """
    records: dict[tuple[str, str, int], dict[str, Any]] = {}
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        record = json.loads(line)
        key = (record["stage"], record["name"], record["step"])
        records.pop(key, None)
        records[key] = record
    return list(records.values())
