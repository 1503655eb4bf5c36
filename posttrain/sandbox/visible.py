"""What of the host a contained program can read: the system's programs and libraries, and this interpreter."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from posttrain.config.errors import UserError

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# Where the dynamic linker finds libraries, and where Debian's commands point to. Nothing else of /etc is needed.
_LINKER = ("/etc/ld.so.cache", "/etc/alternatives")
# What an administrator works on, and where containers often keep the program they are for.
_HIDDEN = ("/usr/src", "/usr/local/src")
_PROJECT = Path(__file__).resolve().parents[2]


def interpreter() -> str:
    """The file of this interpreter, a virtual environment's links followed."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def visible() -> list[str]:
    """Folders and files to be shown, read-only, at their own places; links to be kept as links.

    Of Python that is the installation without any virtual environment, so neither the project nor its libraries are there.

    Raises:
        UserError: one of the folders holds the home folder, the working folder or the project, which would be shown with it; or
            Python lies where nothing is shown.
    """
    shown: list[str] = [path for path in (*_SYSTEM, *_LINKER) if os.path.lexists(path)]
    for path in map(os.path.realpath, (sys.base_prefix, sys.base_exec_prefix, interpreter())):
        if _below(path, hidden()):
            raise UserError(f"this Python is installed in {path}, which sandboxes hide", instead="take one installed elsewhere")
        if not _below(path, shown):
            shown.append(path)
    for what, place in _to_be_kept().items():
        if (folder := _below(place, shown)) and not _below(place, hidden()):
            raise UserError(
                f"sandboxes show {folder}, which holds {what} {place}",
                instead="keep it elsewhere, apart from the system's folders and Python's",
            )
    return shown


def hidden() -> list[str]:
    """Folders below the visible ones that are empty in a sandbox."""
    return [path for path in map(os.path.realpath, _HIDDEN) if os.path.isdir(path) and _below(path, _SYSTEM)]


def _to_be_kept() -> dict[str, str]:
    """Folders that no contained program may read."""
    kept = {"the home folder": os.path.expanduser("~")}  # of a user without home: a path that is none
    if _PROJECT.name not in ("site-packages", "dist-packages"):  # installed, it is a library, without data of the user's
        kept["the project"] = str(_PROJECT)
    with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
        kept["the working folder"] = os.getcwd()
    return {what: os.path.realpath(path) for what, path in kept.items()}


def _below(path: str, folders: Iterable[str]) -> str | None:
    """That of `folders` which is or holds `path`, a path without links."""
    return next((folder for folder in folders if Path(path).is_relative_to(os.path.realpath(folder))), None)


def environment() -> dict[str, str]:
    """All of a contained program's environment; a fixed hash seed, so that a program scores the same twice."""
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
