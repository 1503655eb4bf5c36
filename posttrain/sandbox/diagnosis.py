"""Why a machine lets nobody make a sandbox, and what would change that."""

from __future__ import annotations

import os
from pathlib import Path

_CONTAINER = (
    "start the container so that it may (docker: --security-opt seccomp=unconfined --security-opt systempaths=unconfined)"
)


def advice(kernel_files: Path = Path("/proc"), privileged: bool | None = None) -> str:
    """What most probably stands in the way of namespaces here, a clause with its cure.

    Args:
        kernel_files: where the kernel's files are.
        privileged: whether this process is root; None looks.
    """
    privileged = os.geteuid() == 0 if privileged is None else privileged
    if not privileged and _read(kernel_files / "sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor keeps ordinary users from user namespaces (Ubuntu from 23.10 on): "
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or load an AppArmor profile that grants `userns` to bwrap"
        )
    if not privileged and _read(kernel_files / "sys/kernel/unprivileged_userns_clone") == "0":
        return "the kernel keeps ordinary users from user namespaces: sysctl kernel.unprivileged_userns_clone=1"
    if _read(kernel_files / "sys/user/max_user_namespaces") == "0":
        return "the kernel allows no user namespaces: sysctl user.max_user_namespaces=10000"
    if not (kernel_files / "self/ns/user").exists():
        return "the kernel has no user namespaces: take a Linux from 5.14 on, built with CONFIG_USER_NS"
    if _seccomp_mode(kernel_files) == "2":
        return f"a seccomp filter is over this process, so a container probably forbids namespaces: {_CONTAINER}"
    return (
        "a sandbox needs Linux from 5.14 on with user, mount, process and network namespaces, seccomp filters and a /proc "
        f"of which no part is covered; in a container: {_CONTAINER}"
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _seccomp_mode(kernel_files: Path) -> str | None:
    lines = (_read(kernel_files / "self/status") or "").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("Seccomp:")), None)
