"""The whole comparison: compile, measure in a process that may be lost, write the record and the picture."""

from __future__ import annotations

import importlib.util
import json
import os
import select as waiting
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from posttrain.config.errors import UserError
from posttrain.kernels.bench.cases import is_peer, rivals, select
from posttrain.kernels.bench.compiling import compile_all
from posttrain.kernels.bench.plot import write_plot
from posttrain.kernels.bench.record import write_record
from posttrain.kernels.bench.rows import LARGE_OFFSETS, OURS, Row

NAME = "lightning"
COMPILING_SECONDS, ANSWER_SECONDS = 240.0, 120.0
Job = tuple[Row, str]


@dataclass(frozen=True)
class Outcome:
    """What a comparison left behind.

    Attributes:
        results: copy bandwidth and rows, as in the record.
        record, picture: JSON and SVG.
        log: what libraries printed.
        broken: rows in which ours did not run, with the reason.
    """

    results: dict[str, Any]
    record: Path
    picture: Path
    log: Path
    broken: list[str]


def compare(folder: Path, only: Sequence[str] | None = None, peers: bool = True, tell: Callable[[str], None] = print) -> Outcome:
    """Measure on the first visible GPU and write lightning.json, lightning.svg and lightning.log into `folder`.

    Args:
        folder: made where it is missing; files of these names are replaced.
        only: groups of rows, see `rows.GROUPS`; None for all.
        peers: also what other libraries offer, where they are installed.
        tell: takes a line of progress at a time.

    Raises:
        UserError: there is no NVIDIA GPU or no Triton, or a group is unknown.
    """
    rows = select(only, peers)
    require_gpu()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{NAME}.log"
    log.write_text("", encoding="utf-8")
    tell("compiling")
    with Worker(log, words=("peers",) if peers else ()) as worker:  # it imports what it needs meanwhile
        seconds = compile_all(sorted({row.group for row in rows}), peers, log, COMPILING_SECONDS)
        tell(f"compiled in {seconds:.0f} s")
        before = worker.ask(None, None)
        if "copy" not in before:
            raise UserError(f"the GPU cannot be measured: {before['failed']}", where=str(log))
        safe, risky = jobs_of(rows)
        found = ask_all(safe, worker, tell)
        after = worker.ask(None, None)
        found |= ask_all(risky, worker, tell)
    by_row = {row: {name: found[row, name] for name in row.contestants} for row in rows}
    results = {
        "copy_gb_per_s": before["copy"] / 1e6,
        "copy_gb_per_s_after": after["copy"] / 1e6 if "copy" in after else None,
        "compiling_s": seconds,
        "rows": [summary(row, by_row[row], before["copy"]) for row in rows],
    }
    record = write_record(NAME, results, folder)
    picture = write_plot(results["rows"], folder / f"{NAME}.svg")
    broken = [f"{row.group}, {row.case}: {reason}" for row in rows if (reason := _reason(by_row[row][OURS]))]
    return Outcome(results, record, picture, log, broken)


def require_gpu() -> None:
    """UserError, in one line, where the kernels cannot be measured."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise UserError("`bench kernels` needs an NVIDIA GPU, and torch sees none", instead="ask `posttrain doctor` why")
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "`bench kernels` measures Triton kernels, and Triton is not installed", instead="run `pip install triton`"
        )


def jobs_of(rows: Sequence[Row]) -> tuple[list[Job], list[Job]]:
    """Contestants of a row one after the other; apart, and last, peers whose 32-bit offsets may run over: they may crash."""
    safe: list[Job] = []
    risky: list[Job] = []
    for row in rows:
        for name in row.contestants:
            (risky if is_peer(name) and row.elements >= LARGE_OFFSETS else safe).append((row, name))
    return safe, risky


def ask_all(jobs: Sequence[Job], worker: Worker, tell: Callable[[str], None]) -> dict[Job, dict[str, Any]]:
    """The answer to each, told as it comes."""
    found = {}
    for row, name in jobs:
        answer = found[row, name] = worker.ask(row, name)
        told = f"{answer['ms']:.4g} ms" if "ms" in answer else ", ".join(f"{key} {value}" for key, value in answer.items())
        tell(f"{row.group}: {row.case}: {name}: {told}")
    return found


def summary(row: Row, found: dict[str, dict[str, Any]], bandwidth: float) -> dict[str, Any]:
    """A row of the record.

    Args:
        row: what was measured.
        found: results of each contestant.
        bandwidth: bytes a millisecond of a copy in the same run.

    Returns:
        Sizes, floor, results, and where they can be formed: `of_floor` of ours and its rivals, `fastest_rival` and `speed_up` of
        ours over it, `cost` of ours in units of the baseline.
    """
    floor = row.floor_bytes / bandwidth
    times = {name: result["ms"] for name, result in found.items() if "ms" in result}
    made: dict[str, Any] = {"group": row.group, "case": row.case}
    made |= {"documents": row.documents, "tokens": row.tokens, "heads": row.heads, "floor_ms": floor, "results": found}
    beaten = {name: times[name] for name in rivals(row) if name in times}
    if floor:
        made["of_floor"] = {name: ms / floor for name, ms in times.items() if name == OURS or name in beaten}
    if OURS in times and beaten:
        fastest = min(beaten, key=lambda name: beaten[name])
        made |= {"fastest_rival": fastest, "speed_up": beaten[fastest] / times[OURS]}
    if OURS in times and row.baseline in times:
        made |= {"baseline": row.baseline, "cost": times[OURS] / times[row.baseline]}
    return made


class Worker:
    """A process that measures, started again when it is lost.

    Args:
        log: takes what it and the libraries in it print.
        module: its program.
        words: arguments of the program.
        seconds: within which it answers.
    """

    def __init__(
        self,
        log: Path,
        module: str = "posttrain.kernels.bench.worker",
        words: Sequence[str] = (),
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._log, self._seconds = log, seconds
        self._command = [sys.executable, "-m", module, *words]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        self._started()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def ask(self, row: Row | None, contestant: str | None) -> dict[str, Any]:
        """One answer; `failed` where the process gave none."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        question = {"group": row and row.group, "case": row and row.case, "contestant": contestant}
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            ready, _, _ = waiting.select([process.stdout], [], [], self._seconds)
            line = process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line:
            reply = json.loads(line)
            if not reply["fit"]:
                self._stop()
            return reply["answer"]
        if line is None:
            self._stop()
            return {"failed": f"no answer within {self._seconds:.0f} s"}
        status = process.wait()
        self._process = None
        return {"failed": f"its process ended with status {status}: {_last_line(self._log)}"}

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self._process = None
        if self._process is None:
            # A peer's choices of configurations, made in little time, are not left to its other users.
            environment = {**os.environ, "FLA_CACHE_RESULTS": "0"}
            with self._log.open("a", encoding="utf-8") as file:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                    env=environment,
                )
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _reason(result: dict[str, Any]) -> str | None:
    return result.get("failed") or result.get("absent")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it printed nothing"
