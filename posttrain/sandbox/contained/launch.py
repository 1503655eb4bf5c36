"""The launcher: a fresh process outside that enters new namespaces and starts the sandbox's first process there.

It is a process of its own because the kernel moves only single-threaded processes into a user namespace, and the one that wants
a program run seldom is.
"""

from __future__ import annotations

import os
import sys

from posttrain.sandbox.contained import kernel
from posttrain.sandbox.contained.init import run_as_init
from posttrain.sandbox.contained.order import INNER_ID, Order, read_order, report_failure


def main(order_fd: int, report_fd: int, stop_fd: int) -> None:
    """Starts what the order names and ends with it.

    Args:
        order_fd: open file with the `Order`.
        report_fd: pipe to the process outside.
        stop_fd: pipe from there; see `run_as_init`.
    """
    try:
        order = read_order(order_fd)
        _die_with(order.parent)
        if order.then:
            _enter(order, kernel.NEWUSER)
            os.execv(order.then[0], order.then)
        os.close(order_fd)
        _enter(order, kernel.NAMESPACES)
        first = os.fork()
        if first == 0:
            run_as_init(order, report_fd, stop_fd, mount=True)
        os.waitpid(first, 0)
    except OSError as error:
        report_failure(report_fd, error)
        sys.exit(1)


def _die_with(parent: int) -> None:
    kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it died before we asked to be told


def _enter(order: Order, namespaces: int) -> None:
    """Moves this process into new namespaces, its ids mapped by a helper that stays outside."""
    ready, tell = os.pipe()
    launcher = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(tell)
        status = 1
        if os.read(ready, 1):
            status = _map_ids(launcher, order.outer_id)
        os._exit(status)
    try:
        kernel.unshare(namespaces)
        os.write(tell, b"1")
    finally:
        os.close(tell)
        _, status = os.waitpid(helper, 0)
        os.close(ready)
    if code := os.waitstatus_to_exitcode(status):
        raise OSError(code, f"mapping user ids: {os.strerror(code)}")


def _map_ids(process: int, outer_id: int | None) -> int:
    """Writes the maps of another process's user namespace; 0, or the number of the error."""
    folder = f"/proc/{process}"
    try:
        if outer_id is None:
            # The kernel wants this first from those who may not map any group.
            kernel.write(f"{folder}/setgroups", "deny")
            kernel.write(f"{folder}/uid_map", f"{INNER_ID} {os.geteuid()} 1")
            kernel.write(f"{folder}/gid_map", f"{INNER_ID} {os.getegid()} 1")
        else:
            for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
                kernel.write(f"{folder}/{name}", f"0 {own} 1\n{INNER_ID} {outer_id} 1")
    except OSError as error:
        return error.errno or 1
    return 0
