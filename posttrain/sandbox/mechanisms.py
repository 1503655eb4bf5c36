"""The two ways to make a sandbox. Both start the same first process (`contained/init.py`), which limits and watches."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from posttrain.sandbox.contained.order import INNER_ID, Order
from posttrain.sandbox.contained.root import DEVICES, HOME, LINKS
from posttrain.sandbox.visible import interpreter

_PACKAGE = Path(__file__).resolve().parents[1]
_INSIDE = "/run/posttrain"  # where bubblewrap shows the first process's own code
_CODE = ("__init__.py", "sandbox/__init__.py", "sandbox/contained")
_HIGHEST_ID = 2_000_000_000


class Mechanism(Protocol):
    """A way to make a sandbox."""

    @property
    def name(self) -> str:
        """What it is called in `run`."""
        ...

    def prepare(self, order: Order, descriptors: Sequence[int]) -> tuple[list[str], Order]:
        """The command that starts the sandbox, and the order as that command needs it.

        Args:
            order: what to run.
            descriptors: open files that the command inherits: order, report, stop (see `contained/init.py`).
        """
        ...


@dataclass(frozen=True)
class Namespaces:
    """Linux namespaces made by our own launcher; needs no program but this interpreter."""

    name: str = "namespaces"

    def prepare(self, order: Order, descriptors: Sequence[int]) -> tuple[list[str], Order]:
        """The launcher's command; the order as it is."""
        return _start_python("launch", _PACKAGE.parent, descriptors), order


@dataclass(frozen=True)
class Bubblewrap:
    """The program `bwrap` (https://github.com/containers/bubblewrap), 0.8 or later."""

    name: str = "bubblewrap"

    def prepare(self, order: Order, descriptors: Sequence[int]) -> tuple[list[str], Order]:
        """bwrap's command. It maps but one user: where two can be had, the launcher makes the user namespace and becomes bwrap.

        Raises:
            FileNotFoundError: bwrap is not installed.
        """
        program = shutil.which("bwrap")
        if program is None:
            raise FileNotFoundError("bubblewrap (bwrap) is not installed")
        command = [program, *self._options(order), "--", *_start_python("init", Path(_INSIDE), descriptors)]
        if order.outer_id is None:
            return command, order
        return _start_python("launch", _PACKAGE.parent, descriptors), Order(**{**vars(order), "then": command})

    def _options(self, order: Order) -> list[str]:
        options = ["--die-with-parent", "--as-pid-1", "--clearenv", "--hostname", "sandbox"]
        options += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        if order.outer_id is None:
            options += ["--unshare-user", "--disable-userns", "--uid", str(INNER_ID), "--gid", str(INNER_ID)]
        # Before what is shown, which may lie below it.
        options += ["--size", str(int(order.limits["disk_bytes"])), "--perms", "0700", "--tmpfs", HOME]
        # Without this bwrap makes the folders above a path for its own user alone.
        for folder in ("/dev", *(str(parent) for path in order.visible for parent in reversed(Path(path).parents[:-1]))):
            options += ["--perms", "0755", "--dir", folder]
        for path in order.visible:
            options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
        for path in order.hidden:
            options += ["--tmpfs", path, "--remount-ro", path]
        for name in _CODE:
            options += ["--ro-bind", str(_PACKAGE / name), f"{_INSIDE}/posttrain/{name}"]
        for name in DEVICES:
            options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        for link, target in LINKS.items():
            options += ["--symlink", target, link]
        options += ["--proc", "/proc", *_cover_facts_about_the_host()]
        return [*options, "--remount-ro", "/", "--chdir", HOME]


def _cover_facts_about_the_host() -> list[str]:
    """Options that leave of bubblewrap's /proc only processes, as the option "subset=pid" does in a sandbox of our own."""
    options = []
    for entry in sorted(Path("/proc").iterdir()):
        if entry.name.isdigit() or entry.is_symlink():  # `self` and its like lead to a process
            continue
        # A device where no device can be opened: every attempt is refused.
        options += (
            ["--tmpfs", str(entry), "--remount-ro", str(entry)] if entry.is_dir() else ["--ro-bind", "/dev/null", str(entry)]
        )
    return options


MECHANISMS: dict[str, Mechanism] = {mechanism.name: mechanism for mechanism in (Namespaces(), Bubblewrap())}
"""By name, the preferred one first."""


def outer_id() -> int | None:
    """User and group outside that a program is to run as, where this process may choose; None: as this process's own.

    A program has to run as another user than root, whom the kernel does not limit in processes. The number differs from one
    process to the next, since some of the kernel's counts go by user.
    """
    if os.geteuid() != 0:
        return None
    highest = min(_highest_mapped("uid_map"), _highest_mapped("gid_map"), _HIGHEST_ID)
    if highest < INNER_ID:
        return None  # in a container of one user; root there is an ordinary user outside
    return highest - os.getpid() % max(1, min(1 << 22, highest // 2))


def _highest_mapped(name: str) -> int:
    ranges = [[int(word) for word in line.split()] for line in Path(f"/proc/self/{name}").read_text().splitlines()]
    first, _, count = max(ranges)
    return first + count - 2  # the very last number often means "nobody"


def _start_python(module: str, path: Path, descriptors: Sequence[int]) -> list[str]:
    # -I and -S: neither the environment nor installed packages have a say in the sandbox's own processes.
    code = (
        f"import sys; sys.path.insert(0, {str(path)!r}); from posttrain.sandbox.contained.{module} import main; "
        f"main({', '.join(map(str, descriptors))})"
    )
    return [interpreter(), "-I", "-S", "-B", "-c", code]


def python_version_is_enough() -> bool:
    """os.pidfd_open came with 3.9; it is missing where Python was built against an old C library."""
    return hasattr(os, "pidfd_open") and sys.platform == "linux"
