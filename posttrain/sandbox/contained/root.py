"""The file system of a sandbox: a few of the host's folders to read, one folder in memory to write."""

from __future__ import annotations

import os
from collections.abc import Sequence

from posttrain.sandbox.contained import kernel

HOME = "/tmp"
"""The one folder that can be written; working folder of the program."""

# Not zero: mapped as shared, it is memory that no limit counts.
DEVICES = ("null", "full", "random", "urandom")
LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
    "/dev/shm": HOME,
}
_LARGEST_SKELETON = "size=1m,nr_inodes=2k,mode=755"


def inodes(disk_bytes: int) -> int:
    """Files and folders that the writable folder may hold: one for 4 KiB, and a few to begin with."""
    return disk_bytes // 4096 + 256


def build(visible: Sequence[str], hidden: Sequence[str], disk_bytes: int) -> None:
    """Replaces the root of this process, which has a mount and a process namespace of its own, by the sandbox's.

    The former root is moved aside first, so that a visible folder may lie anywhere, also below /tmp.

    Args:
        visible: folders and files of the host to be read, without links in their names.
        hidden: folders below those that are to be empty.
        disk_bytes: size of `HOME`.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, _LARGEST_SKELETON)
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    kernel.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    kernel.mount("tmpfs", "/new", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, _LARGEST_SKELETON)
    # Before what is shown, which may lie below it.
    os.mkdir(f"/new{HOME}")
    options = f"size={disk_bytes},nr_inodes={inodes(disk_bytes)},mode=700"
    kernel.mount("tmpfs", f"/new{HOME}", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    for path in visible:
        _show(path)
    for path in hidden:
        kernel.mount("tmpfs", f"/new{path}", "tmpfs", kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    for name in DEVICES:
        _bind(f"/dev/{name}")
    for link, target in LINKS.items():
        os.symlink(target, f"/new{link}")
    os.mkdir("/new/proc")
    # Processes alone: no /proc/sys, no facts about the host. Mounted while the host's is still there, as the kernel wants it.
    kernel.mount("proc", "/new/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, "subset=pid")
    kernel.unmount("/old")
    os.chdir("/new")
    kernel.pivot_root(".", ".")
    kernel.unmount(".")
    os.chdir("/")
    kernel.mount("tmpfs", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV)


def _show(path: str) -> None:
    """A folder or file of the host at its own place, read-only; a link stays a link."""
    old, new = f"/old{path}", f"/new{path}"
    if os.path.islink(old):
        os.makedirs(os.path.dirname(new), exist_ok=True)
        os.symlink(os.readlink(old), new)
        return
    _bind(path)
    kernel.make_read_only(new)


def _bind(path: str) -> None:
    old, new = f"/old{path}", f"/new{path}"
    os.makedirs(new if os.path.isdir(old) else os.path.dirname(new), exist_ok=True)
    if not os.path.isdir(old):
        with open(new, "x"):
            pass
    kernel.mount(old, new, None, kernel.MS_BIND | kernel.MS_REC)
