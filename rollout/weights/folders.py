"""Folders in shared memory that live no longer than the process that made them, however it ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "posttrain-weights-"
_LOCK = ".lock"

_held: dict[Path, int] = {}
"""Locks of this process, which the kernel releases when it ends."""


def new_folder(root: Path, version: int) -> Path:
    """A new folder, its lock held by this process. What killed processes left behind in the root is removed first. OSError."""
    _sweep(root)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{version}-", dir=root))
    part = folder / (_LOCK + ".part")
    handle = os.open(part, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.replace(part, folder / _LOCK)  # under its name it is never seen unlocked
    _held[folder] = handle
    return folder


def remove(folder: Path) -> None:
    """Delete a folder; nothing happens where there is none. Readers that have its files open keep them until they are done."""
    shutil.rmtree(folder, ignore_errors=True)
    handle = _held.pop(folder, None)
    if handle is not None:
        os.close(handle)


def _sweep(root: Path) -> None:
    for folder in root.glob(f"{PREFIX}*"):
        if folder in _held:
            continue
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:  # being made or removed, or another user's
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # its process lives
        finally:
            os.close(handle)
