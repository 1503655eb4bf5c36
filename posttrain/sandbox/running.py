"""Running a program contained: `run`, and `available` where it may not be possible.

The process here watches time and output; the sandbox's first process watches memory and files; the kernel keeps the rest.
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.sandbox.contained.order import Order
from posttrain.sandbox.contained.seccomp import MACHINES
from posttrain.sandbox.diagnosis import advice
from posttrain.sandbox.mechanisms import MECHANISMS, outer_id, python_version_is_enough
from posttrain.sandbox.types import INTERPRETER, Limits, Outcome, Program, Status
from posttrain.sandbox.visible import environment, hidden, interpreter, visible

_SETUP_SECONDS = 60.0  # until the program starts; long, since the machine may be busy training
_DRAIN_SECONDS = 5.0  # from the end of the sandbox to the end of its output
_STOP_SECONDS = 10.0  # from a limit reached to the end of the sandbox
_LONGEST_REASON = 300
_OUT_OF_MEMORY = ("MemoryError", "std::bad_alloc", "Cannot allocate memory")


class SandboxError(RuntimeError):
    """The sandbox itself failed; it says nothing about the program."""


def available() -> str | None:
    """None where programs can be run contained, else the reason why not, with what would help."""
    reasons = []
    for name in MECHANISMS:
        reason = unavailable(name)
        if reason is None:
            return None
        reasons.append(f"{name}: {reason}")
    return "; ".join(reasons)


@functools.cache
def unavailable(mechanism: str) -> str | None:
    """None where the mechanism of that name works here, else the reason; a small program is run to find out, once."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES or not python_version_is_enough():
        return f"sandboxes are made on Linux on {' and '.join(MACHINES)} with os.pidfd_open, not on {platform.platform()}"
    try:
        outcome = _run(Program((INTERPRETER, "-I", "-S", "-c", "print(6 * 7)")), Limits(wall_seconds=60), mechanism)
    except (FileNotFoundError, UserError) as error:
        return str(error)
    except (SandboxError, OSError) as error:
        return f"{error} ({advice()})"
    if outcome.status is Status.OK and outcome.stdout == b"42\n":
        return None
    return f"a trial program ended as {outcome.status}: {outcome.reason}"


def run(program: Program, limits: Limits | None = None, mechanism: str | None = None, shown: Sequence[str] = ()) -> Outcome:
    """Runs a program in a sandbox of its own and waits for it.

    It sees the system's programs and libraries and this Python, read-only, and its own folder; no other file, no network, no
    other process, no environment of ours. Everything it started has ended when this returns. Threads may call this at once.

    Args:
        program: what to run.
        limits: what it may use; None takes the defaults.
        mechanism: "namespaces" or "bubblewrap"; None takes the first that works.
        shown: further folders of the host that it can read, without links in their names.

    Returns:
        What became of it. A program that misbehaves is an outcome, never an exception.

    Raises:
        UserError: no sandbox can be made here. A program is never run without one.
        SandboxError: the sandbox failed, though it had worked before.
    """
    if mechanism is not None and mechanism not in MECHANISMS:
        raise UserError(f"unknown sandbox mechanism '{mechanism}'", instead=suggest(mechanism, MECHANISMS))
    names = [mechanism] if mechanism else list(MECHANISMS)
    chosen = next((name for name in names if unavailable(name) is None), None)
    if chosen is None:
        reasons = "; ".join(f"{name}: {unavailable(name)}" for name in names)
        raise UserError("untrusted programs cannot be run contained on this machine", instead=reasons)
    return _run(program, limits or Limits(), chosen, shown)


def _run(program: Program, limits: Limits, mechanism: str, shown: Sequence[str] = ()) -> Outcome:
    argv = [interpreter(), *program.argv[1:]] if program.argv[0] == INTERPRETER else list(program.argv)
    files = {name: _bytes(content) for name, content in program.files.items()}
    order = Order(argv, environment(), files, vars(limits), [*visible(), *shown], hidden(), outer_id(), os.getpid())
    order_fd = os.memfd_create("order")
    report_read, report_write = os.pipe()
    stop_read, stop_write = os.pipe()
    inherited = (order_fd, report_write, stop_read)
    stdin_fd = _sealed(_bytes(program.stdin))
    process: subprocess.Popen[bytes] | None = None
    try:
        try:
            command, order = MECHANISMS[mechanism].prepare(order, inherited)
            _write_all(order_fd, order.written())
            process = subprocess.Popen(
                command,
                stdin=stdin_fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=inherited,
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:
            for descriptor in (*inherited, stdin_fd):
                os.close(descriptor)
        return _Supervision(process, report_read, stop_write, limits).outcome()
    except BaseException:  # an interrupt may come at any place
        if process is not None:
            _kill(process)
        raise
    finally:
        os.close(report_read)
        os.close(stop_write)
        for pipe in (process.stdout, process.stderr) if process is not None else ():
            assert pipe is not None
            pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a launcher. Its death takes the first process with it, and that takes all others, a little later."""
    process.kill()
    process.wait()


def _bytes(content: str | bytes) -> bytes:
    return content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _sealed(content: bytes) -> int:
    """An open file that holds `content`, at its beginning, and can no longer be changed by those who get it."""
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    _write_all(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return descriptor


@dataclass
class _Supervision:
    """One sandbox under way: reads what comes out, and kills it when a limit is reached."""

    process: subprocess.Popen[bytes]
    report_fd: int
    stop_fd: int
    limits: Limits
    chunks: dict[str, bytearray] = field(
        default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}
    )
    end: list[str] = field(default_factory=list)  # the last report, in words; that of a failed setup stays
    started: float | None = None
    stopped: Status | None = None

    def outcome(self) -> Outcome:
        """Waits for the end and says what it was. Whatever happens, no process of the sandbox is left."""
        begun = time.monotonic()
        try:
            self._read(begun)
            seconds = time.monotonic() - (self.started or begun)
        finally:
            self._end()
        status, code, reason = self._judge()
        stdout, stderr = bytes(self.chunks["stdout"]), bytes(self.chunks["stderr"])
        return Outcome(status, code, stdout, stderr, seconds, reason)

    def _read(self, begun: float) -> None:
        assert self.process.stdout is not None and self.process.stderr is not None
        pipes = {"stdout": self.process.stdout.fileno(), "stderr": self.process.stderr.fileno(), "report": self.report_fd}
        with selectors.DefaultSelector() as selector:
            for name, descriptor in pipes.items():
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ, name)
            while selector.get_map():
                left = self._deadline(begun) - time.monotonic()
                if left <= 0:
                    if self.started is None:
                        raise SandboxError(f"no program was started within {_SETUP_SECONDS:.0f} s")
                    self.stopped = self.stopped or (None if self._ended() else Status.TIMEOUT)
                    return
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fd)
                    elif not self._take(key.data, chunk):
                        self.stopped = Status.OUTPUT
                        return

    def _deadline(self, begun: float) -> float:
        if self.started is None:
            return begun + _SETUP_SECONDS
        # A program that ended at the last moment still has its output to be read.
        return self.started + self.limits.wall_seconds + (_DRAIN_SECONDS if self._ended() else 0.0)

    def _ended(self) -> bool:
        return bool(self.end)

    def _take(self, name: str, chunk: bytes) -> bool:
        """Keeps what was read; False where the program has written too much."""
        if name != "report":
            room = self.limits.output_bytes - len(self.chunks["stdout"]) - len(self.chunks["stderr"])
            self.chunks[name] += chunk[:room]
            return len(chunk) <= room
        lines = (self.chunks[name] + chunk).split(b"\n")
        self.chunks[name] = lines.pop()
        for line in lines:
            if line == b"started":
                self.started = time.monotonic()
            elif self.end[:1] != ["setup"]:  # a child that failed to become the program ends too, and that is reported next
                self.end = line.decode(errors="replace").split()
        return True

    def _end(self) -> None:
        """Ends the sandbox and waits for all of its processes: its first one ends after them, and the launcher after that."""
        try:
            os.write(self.stop_fd, b"x")
        except BrokenPipeError:
            pass  # it has ended
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            _kill(self.process)

    def _judge(self) -> tuple[Status, int | None, str]:
        """Status, exit status and reason, from what was reported and what was done."""
        limits = self.limits
        match self.end:
            case ["setup", *words]:
                raise SandboxError(" ".join(words))
            case _ if self.stopped is Status.OUTPUT:
                return Status.OUTPUT, None, f"wrote more than {limits.output_bytes} bytes"
            case ["stopped", "time"] | [] if self.stopped is Status.TIMEOUT or self.end:
                return Status.TIMEOUT, None, f"ran longer than {limits.wall_seconds:g} s"
            case ["stopped", "memory"]:
                return Status.MEMORY, None, f"used more than {limits.memory_bytes} bytes of memory"
            case ["stopped", "disk"]:
                return Status.DISK, None, "made too many files"
            case ["signal", number, cpu_seconds]:
                return self._judge_signal(int(number), float(cpu_seconds))
            case ["code", number, _]:
                return self._judge_code(int(number))
        raise SandboxError(f"the sandbox ended without a report: {self._last_line() or 'it said nothing'}")

    def _judge_signal(self, number: int, cpu_seconds: float) -> tuple[Status, int | None, str]:
        if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_seconds >= self.limits.cpu_seconds):
            return Status.TIMEOUT, None, f"used more than {self.limits.cpu_seconds:g} s of processor time"
        known = {member.value: member.name for member in signal.Signals}
        if number == signal.SIGXFSZ:
            return Status.DISK, None, f"wrote a file of more than {self.limits.disk_bytes} bytes"
        return Status.KILLED, None, f"ended by signal {known.get(number, number)}"

    def _judge_code(self, code: int) -> tuple[Status, int | None, str]:
        if code == 0:
            return Status.OK, 0, ""
        line = self._last_line()
        # What could not be had under the limit of one process's memory is told by the program's own error alone.
        status = Status.MEMORY if line.startswith(_OUT_OF_MEMORY) or _OUT_OF_MEMORY[1] in line else Status.FAILED
        return status, code, f"exit status {code}" + (f": {line}" if line else "")

    def _last_line(self) -> str:
        lines = self.chunks["stderr"].decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:_LONGEST_REASON] if lines else ""
