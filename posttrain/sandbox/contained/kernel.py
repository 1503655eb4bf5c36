"""Linux's calls that Python has no name for (some not before 3.12), with the C library's errors as OSError."""

from __future__ import annotations

import ctypes
import errno
import os

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000,
    0x2000000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
NAMESPACES = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

_MOUNT_SETATTR = 442  # the same number on every architecture, as of all calls since Linux 5.1
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_CAPABILITY_VERSION_3 = 0x20080522

# The module `signal` has them too, but takes as long to import as the interpreter to start.
SIGINT, SIGKILL, SIGPIPE, SIGXFSZ = 2, 9, 13, 25
_DEFAULT, _IGNORE = 0, 1  # SIG_DFL, SIG_IGN

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Moves this process (children, for NEWPID) into new namespaces."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mounts `source` on `target`."""
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), data.encode() if data else None
    )
    _checked(result, f"mount {kind or source} on {target}")


def unmount(target: str) -> None:
    """Takes the mount and all below it out of sight."""
    _checked(_libc.umount2(target.encode(), DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Makes `new` the root and puts the former root on `old`."""
    _checked(_libc.pivot_root(new.encode(), old.encode()), f"pivot_root {new}")


def make_read_only(target: str) -> None:
    """Makes a mount and all mounts below it read-only, without set-user-ID programs and devices (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_READ_ONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(target.encode()),
        ctypes.c_uint(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    _checked(result, f"mount_setattr {target}")


def prctl(option: int, *values: int) -> int:
    """The call of that name; missing values are 0."""
    padded = [*values, 0, 0, 0, 0][:4]
    return _checked(_libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(value) for value in padded)), f"prctl {option}")


def drop_bounding_set() -> None:
    """Lets no program that is started from here on gain a capability, where this process may say so (CAP_SETPCAP)."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EPERM):
                # EINVAL: past the kernel's last one. EPERM: this process has none to pass on, and no_new_privs keeps it so.
                return
            raise


def drop_capabilities() -> None:
    """Gives up every capability that this process holds."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def ignore_interrupt() -> None:
    """Ignores SIGINT: a program's signals reach a sandbox's first process only where it has a handler, and Python has one."""
    _libc.signal(ctypes.c_int(SIGINT), ctypes.c_void_p(_IGNORE))


def restore_signals() -> None:
    """Gives the signals that Python or we ignore their usual effect again, for the program that this process becomes."""
    for number in (SIGINT, SIGPIPE, SIGXFSZ):
        _libc.signal(ctypes.c_int(number), ctypes.c_void_p(_DEFAULT))


def read(path: str) -> str:
    """Text of one of the kernel's files."""
    with open(path) as file:
        return file.read()


def write(path: str, text: str) -> None:
    """Writes one of the kernel's files, in one call as the kernel wants it."""
    with open(path, "w") as file:
        file.write(text)
