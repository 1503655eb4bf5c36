"""The sandbox's first process: it puts the program's files in place, starts it with every right given up, and watches it.

When this process ends, the kernel ends every other process of the sandbox, however many there are and whatever they catch.
"""

from __future__ import annotations

import os
import resource
import select
import time

from posttrain.sandbox.contained import kernel, root, seccomp
from posttrain.sandbox.contained.order import INNER_ID, Order, read_order, report, report_failure

TYPE_CHECKING = False
if TYPE_CHECKING:  # the module `typing` is slow to import
    from typing import NoReturn

_TICK = 0.01  # seconds between two looks at memory
_GRACE = 5.0  # seconds after which a time limit is enforced here, should the process outside have failed to


def main(order_fd: int, report_fd: int, stop_fd: int) -> NoReturn:
    """Entry where bubblewrap has made the namespaces and the file system."""
    order = read_order(order_fd)
    os.close(order_fd)
    run_as_init(order, report_fd, stop_fd, mount=False)


def run_as_init(order: Order, report_fd: int, stop_fd: int, mount: bool) -> NoReturn:
    """Runs the program to its end, reports, and ends.

    Args:
        order: what to run.
        report_fd: pipe to the process outside. A line "started", then "code NUMBER CPU_SECONDS", "signal NUMBER CPU_SECONDS" or
            "stopped memory|disk|time|order"; "setup ERROR" where the sandbox could not be made.
        stop_fd: pipe from there; a byte in it, or its end, ends the sandbox.
        mount: whether the file system is still the host's.
    """
    try:
        kernel.write("/proc/self/oom_score_adj", "1000")  # should the host run out of memory, this goes first
        kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # the program cannot look into this process, nor at its open files
        kernel.ignore_interrupt()
        os.setsid()
        if mount:
            root.build(order.visible, order.hidden, int(order.limits["disk_bytes"]))
        _write_files(order.files)
        for descriptor in (report_fd, stop_fd):  # their numbers may be above those that the program's limit lets it close
            os.set_inheritable(descriptor, False)
        started = time.monotonic()
        program = os.fork()
        if program == 0:
            _become(order, report_fd)
        report(report_fd, "started")
        end = _watch(program, order, started, stop_fd)
        _kill_all()
        report(report_fd, *end)
    except Exception as error:
        report_failure(report_fd, error)
        os._exit(1)
    os._exit(0)


def _write_files(files: dict[str, bytes]) -> None:
    os.chdir(root.HOME)
    os.umask(0o077)
    for name, content in files.items():
        if folder := os.path.dirname(name):
            os.makedirs(folder, exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)
    if os.getuid() != INNER_ID:
        own = {"."}  # and no folder of the host's that is shown below
        for name in files:
            while name:
                own.add(name)
                name = os.path.dirname(name)
        for name in own:
            os.chown(name, INNER_ID, INNER_ID)


def _become(order: Order, report_fd: int) -> NoReturn:
    """Turns a child of the first process into the program."""
    try:
        _limit(order.limits, slack=2 if os.getuid() == INNER_ID else 0)
        if os.getuid() != INNER_ID:
            os.setgroups([])
            os.setresgid(INNER_ID, INNER_ID, INNER_ID)
        kernel.drop_bounding_set()  # needs a capability that changing the user takes away
        if os.getuid() != INNER_ID:
            os.setresuid(INNER_ID, INNER_ID, INNER_ID)
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.restore_signals()
        seccomp.install()
    except Exception as error:
        report_failure(report_fd, error)
        os._exit(1)
    os.closerange(3, report_fd)
    os.closerange(report_fd + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    try:
        os.execvpe(order.argv[0], order.argv, order.environment)
    except OSError as error:
        os.write(2, f"cannot start {order.argv[0]}: {error.strerror}\n".encode())
        os._exit(127)


def _limit(limits: dict[str, float], slack: int) -> None:
    """Sets the limits that the kernel keeps. `slack` is for processes of ours that have the program's user."""
    cpu = int(-(-limits["cpu_seconds"] // 1))
    disk, address_space = int(limits["disk_bytes"]), 2 * int(limits["memory_bytes"])
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),  # a signal first, then a kill
        (resource.RLIMIT_AS, address_space, address_space),
        (resource.RLIMIT_FSIZE, disk, disk),
        (resource.RLIMIT_NPROC, int(limits["processes"]) + slack, int(limits["processes"]) + slack),
        (resource.RLIMIT_NOFILE, int(limits["open_files"]), int(limits["open_files"])),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_SIGPENDING, 1024, 1024),
    ):
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def _watch(program: int, order: Order, started: float, stop_fd: int) -> tuple[object, ...]:
    """Waits for the program's end, or brings it about; what to report."""
    ended = os.pidfd_open(program)
    waiting = select.poll()  # select itself knows no descriptor from 1024 on, as a busy process outside hands them down
    for descriptor in (ended, stop_fd):
        waiting.register(descriptor, select.POLLIN)
    files_at_first = _files_used()
    while True:
        if stop_fd in (descriptor for descriptor, _ in waiting.poll(_TICK * 1000)):
            return "stopped", "order"
        while True:
            process, status, usage = os.wait4(-1, os.WNOHANG)
            if process == program:
                code = os.waitstatus_to_exitcode(status)
                cpu = round(usage.ru_utime + usage.ru_stime, 3)
                return ("code", code, cpu) if code >= 0 else ("signal", -code, cpu)
            if process == 0:
                break
        if _memory_used(order.limits["memory_bytes"]) > order.limits["memory_bytes"]:
            return "stopped", "memory"
        if _files_used() - files_at_first > root.inodes(int(order.limits["disk_bytes"])):
            return "stopped", "disk"
        if time.monotonic() - started > order.limits["wall_seconds"] + _GRACE:
            return "stopped", "time"


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]


def _memory_used(enough: float) -> int:
    """Bytes in memory of all processes but this one, shared pages divided among those that share them.

    Reading shares is slow, so it is done only where the plain sum is above `enough`.
    """
    resident = {process: _resident(process) for process in _processes()}
    if sum(resident.values()) <= enough:
        return sum(resident.values())
    return sum(_proportional(process, most) for process, most in resident.items())


def _resident(process: str) -> int:
    try:
        return int(kernel.read(f"/proc/{process}/statm").split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0  # ended in between


def _proportional(process: str, otherwise: int) -> int:
    try:
        lines = kernel.read(f"/proc/{process}/smaps_rollup").splitlines()
    except OSError:
        return otherwise  # it hides from us, so all it maps counts
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), otherwise)


def _files_used() -> int:
    # bubblewrap gives its folder in memory a size, but no limit on the number of files.
    folder = os.statvfs(root.HOME)
    return folder.f_files - folder.f_ffree


def _kill_all() -> None:
    try:
        os.kill(-1, kernel.SIGKILL)
    except ProcessLookupError:
        pass  # none is left
