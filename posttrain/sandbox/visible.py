"""What of the host a contained program can read: the system's programs and libraries, and this interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from posttrain.config.errors import UserError

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# Where the dynamic linker finds libraries, and where Debian's commands point to. Nothing else of /etc is needed.
_LINKER = ("/etc/ld.so.cache", "/etc/alternatives")


def interpreter() -> str:
    """The file of this interpreter, a virtual environment's links followed."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def visible() -> list[str]:
    """Folders and files to be shown, read-only, at their own places; links to be kept as links.

    Of Python that is the installation without any virtual environment, so neither the project nor its libraries are there.

    Raises:
        UserError: Python's installation folder holds the user's home, which would be shown with it.
    """
    shown: list[str] = [path for path in (*_SYSTEM, *_LINKER) if os.path.lexists(path)]
    program = interpreter()
    home = os.path.realpath(os.path.expanduser("~"))  # of a user without one: some path that is none
    for path in (sys.base_prefix, sys.base_exec_prefix, program):
        path = os.path.realpath(path)
        if Path(home).is_relative_to(path):
            raise UserError(
                f"this Python is installed in {path}, which holds the home folder, and sandboxes show where Python is installed",
                instead="take a Python in a folder of its own",
            )
        if not any(Path(path).is_relative_to(os.path.realpath(other)) for other in shown):
            shown.append(path)
    return shown


def environment() -> dict[str, str]:
    """All of a contained program's environment; a fixed hash seed, so that a program scores the same twice."""
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
