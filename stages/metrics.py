"""The run's measurements: one append-only file of JSON lines that a reader may follow while it grows."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

RESTART = "restart"
"""Name of the record that ends what a stage logged before: it starts again from its first step."""


class MetricsWriter:
    """Appends records of one stage to metrics.jsonl."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line a value: {"step", "stage", "name", "value", "time"}; time in seconds since the epoch.

        A line is one write to a file opened for appending, so lines of several writers do not mix. A value that is not
        finite is written as null, which keeps the line valid JSON.

        Raises:
            OSError: the line could not be written whole, such as on a full disk.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                _append(handle, b"\n")  # a full disk cut the line before off
            for name, value in values.items():
                number = float(value)
                record = {
                    "step": step,
                    "stage": self.stage,
                    "name": name,
                    "value": number if math.isfinite(number) else None,
                    "time": time.time(),
                }
                _append(handle, (json.dumps(record) + "\n").encode())
        finally:
            os.close(handle)


def _append(handle: int, line: bytes) -> None:
    if os.write(handle, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def log_restart(path: Path, stage: str) -> None:
    """Note that a stage starts again from its first step, so that what it logged before counts no more."""
    MetricsWriter(path, stage).log(0, {RESTART: 0.0})


class RecordTail:
    """Follows a metrics file: every `read` gives the records appended since the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""

    def read(self) -> Iterator[dict[str, Any]]:
        """New records in order, those named `RESTART` among them; a line still being written is left for the next time.

        A line that a full disk cut off is passed over with a warning; its step is logged again when the stage resumes.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError:
                    logger.warning("%s: a broken line is passed over: %s", self.path, line[:80])
                    continue
                yield record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file that count, in order.

    Of several with the same stage, name and step the last one counts: a resumed stage logs the steps after its checkpoint
    again. What a stage logged before it started again from its first step does not count.
    """
    records: dict[tuple[str, str, int], dict[str, Any]] = {}
    for record in RecordTail(path).read():
        if record["name"] == RESTART:
            records = {key: kept for key, kept in records.items() if key[0] != record["stage"]}
            continue
        key = (record["stage"], record["name"], record["step"])
        records.pop(key, None)
        records[key] = record
    return list(records.values())
