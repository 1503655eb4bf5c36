"""Child processes that compare expressions, so that one answer can neither stop nor fill the process that scores.

math-verify bounds its time by `signal.alarm`. That works in main threads only, and no signal interrupts arithmetic on big
integers (`10**10**10`). Here every comparison runs in a child with a bound on its memory, and one that takes too long is killed.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("math_worker.py")
START_SECONDS = 120.0  # imports sympy; half a second on an idle machine


@dataclass(frozen=True)
class Comparison:
    """What came of one comparison.

    Attributes:
        expected: what was read as the expected answer; None where it could not be read.
        read: what was read as the answer; None where it could not be read.
        right: whether they are equal.
        evaluated: False where a number was expected and an expression was left standing ("12+34").
        failure: why there was no comparison (time, memory, a crash), else "".
    """

    expected: str | None
    read: str | None = None
    right: bool = False
    evaluated: bool = True
    failure: str = ""


class MathPool:
    """Compares expressions in child processes, any number of threads at once; processes start when they are needed.

    Args:
        seconds: longest time of a comparison, from when a started process has it.
        workers: most processes; further threads wait for one.
    """

    def __init__(self, seconds: float, workers: int) -> None:
        self.seconds, self._workers = seconds, workers
        self._idle: list[_Worker]
        self._forget()
        os.register_at_fork(after_in_child=self._forget)  # the parent's processes answer the parent
        atexit.register(self.close)

    def compare(self, expected: Sequence[str], answer: Sequence[str]) -> Comparison:
        """Compare two expressions, each given as texts of which the first readable one counts.

        Raises:
            RuntimeError: no process could be started.
        """
        with self._places:
            worker = self._take()
            used = worker.served > 0
            try:
                result = worker.compare(expected, answer, self.seconds)
            except BaseException:  # an interrupt in the middle: its reply would be taken for the next one's
                worker.kill()
                raise
            if worker.healthy:
                with self._lock:
                    self._idle.append(worker)
                return result
            worker.kill()
        # A process that had served others may have died of what they left behind. Time is no such reason.
        if used and not worker.late:
            return self.compare(expected, answer)
        return result

    def close(self) -> None:
        """End all idle processes; the pool can still be used."""
        with self._lock:
            idle = self._idle
            self._idle = []
        for worker in idle:
            worker.kill()

    def _forget(self) -> None:
        self._places = threading.Semaphore(self._workers)
        self._lock = threading.Lock()
        self._idle = []

    def _take(self) -> _Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive():
                    return worker
                worker.kill()
        return _Worker()


class _Worker:
    """One child process, used by one thread at a time."""

    def __init__(self) -> None:
        self.served, self.late, self.healthy = 0, False, True
        # -P keeps this folder off the child's path: it holds a math.py and a code.py. One thread: the bound on memory counts
        # what thread pools of numerical libraries reserve.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._buffer = b""
        if self._line(time.monotonic() + START_SECONDS) != {"ready": True}:
            self.kill()
            raise RuntimeError(
                f"the process that compares expressions did not start ({sys.executable} {WORKER}, exit status "
                f"{self._process.returncode}); it needs the package math-verify and {START_SECONDS:.0f} s at most"
            )

    def compare(self, expected: Sequence[str], answer: Sequence[str], seconds: float) -> Comparison:
        deadline = time.monotonic() + seconds
        request = json.dumps({"expected": list(expected), "answer": list(answer), "seconds": seconds}) + "\n"
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except OSError:
            return self._failed(None)
        first = self._line(deadline)
        if first is None or "error" in first:
            return self._failed(None, first, seconds)
        if first["expected"] is None:
            self.served += 1
            return Comparison(None)
        second = self._line(deadline)
        if second is None or "error" in second:
            return self._failed(first["expected"], second, seconds)
        self.served += 1
        return Comparison(first["expected"], second["read"], second["right"], second["evaluated"])

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was left in the buffer has no reader any more
                    pass

    def _failed(self, expected: str | None, line: dict[str, Any] | None = None, seconds: float = 0.0) -> Comparison:
        if line is not None:
            # An error of the library leaves the process usable, want of memory does not.
            self.served += 1
            self.healthy = not line.get("fatal", False)
            return Comparison(expected, failure=line["error"])
        self.healthy = False
        if self.late:
            return Comparison(expected, failure=f"takes longer than {seconds:g} s")
        return Comparison(expected, failure="ended the process that compares expressions")

    def _line(self, deadline: float) -> dict[str, Any] | None:
        """The next line, or None when the process ended or, with `late`, the deadline passed."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.late = True
                    return None
                read = os.read(self._process.stdout.fileno(), 65536)
                if not read:
                    return None
                self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)
