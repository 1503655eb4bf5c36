"""What goes into a sandbox and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath

from posttrain.config.errors import UserError

INTERPRETER = "python"
"""First word of a command that stands for this interpreter, without the virtual environment's packages."""


class Status(StrEnum):
    """How a program ended."""

    OK = "ok"  # by itself, with exit status 0
    FAILED = "failed"  # by itself, with another exit status
    KILLED = "killed"  # by a signal that no limit explains
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT = "output"
    DISK = "disk"


@dataclass(frozen=True)
class Program:
    """A command and the files that it finds in its folder.

    Attributes:
        argv: the command; `INTERPRETER` as its first word is this Python.
        files: text or bytes by relative path, written into the working folder.
        stdin: what standard input holds.
    """

    argv: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    stdin: str | bytes = b""

    def __post_init__(self) -> None:
        if not self.argv:
            raise UserError("a program without a command", instead="give at least one word in argv")
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
                raise UserError(f"a program's file is named '{name}'", instead="write a relative path without '..'")

    @classmethod
    def python(cls, source: str, stdin: str | bytes = b"") -> Program:
        """A Python program in one file, `main.py`."""
        return cls((INTERPRETER, "-B", "main.py"), {"main.py": source}, stdin)


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        wall_seconds: time from its start; a watcher outside kills it after that.
        cpu_seconds: processor time of any one process; fractions are rounded up.
        memory_bytes: memory of all processes together (shares of shared pages). One process may map twice as much.
        processes: processes and threads at once.
        output_bytes: standard output and error together.
        disk_bytes: size of the one folder it can write to; it lies in memory, and counts beside `memory_bytes`.
        open_files: open files of a process.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    processes: int = 32
    output_bytes: int = 1 << 20
    disk_bytes: int = 64 << 20
    open_files: int = 128

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise UserError(f"limit {name} is {value}", instead="give a number above 0")


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        status: how it ended.
        exit_code: its exit status where it ended by itself, else None.
        stdout: its output, at most `Limits.output_bytes` of it together with `stderr`.
        stderr: its errors.
        seconds: wall time from its start to its end.
        reason: one line that says why it is not ok; "" where it is.
    """

    status: Status
    exit_code: int | None
    stdout: bytes
    stderr: bytes
    seconds: float
    reason: str
