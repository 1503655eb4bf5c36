"""A JSON record of a benchmark that says where and how it was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "triton", "transformers", "trl", "deepspeed", "fla-core", "lightning-attn", "vllm")


def machine() -> dict[str, Any]:
    """Card, processor, threads, and versions of Python and of the libraries that matter."""
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: found for name in LIBRARIES if (found := _version(name)) is not None},
    }


def write_record(name: str, results: Mapping[str, Any], folder: Path) -> Path:
    """Write NAME.json with the results, the machine, the command, the commit and the date; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "name": name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "commit": _commit(),
        "machine": machine(),
        "results": dict(results),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _program() -> str:
    """`posttrain`, or `python -m MODULE`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).stem
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the tree, with a "+" where files differ from it; None where this file belongs to no repository."""
    here = Path(__file__).resolve()
    try:
        # An installed package may lie inside somebody else's repository.
        _git(here, "ls-files", "--error-unmatch", here.name)
        return _git(here, "describe", "--always", "--abbrev=12", "--dirty=+")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(here: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()
