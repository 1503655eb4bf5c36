"""What every benchmark shares: medians of repeated runs, and a JSON record that says where and how they were measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "triton", "transformers", "trl", "deepspeed", "flash-linear-attention", "lightning-attn")


def alternating_medians(runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each run, taken in turns, so that a drift of the machine meets all of them alike.

    Args:
        runs: name -> what is timed; work on a GPU is waited for.
        repeats: timed calls of each.
        warmup: calls of each before the first timed one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + repeats):
        for name, run in runs.items():
            taken = _seconds(run)
            if number >= warmup:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Processor, card, threads, and versions of Python and of the libraries that matter."""
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: found for name in LIBRARIES if (found := _version(name)) is not None},
    }


def write_record(name: str, results: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write NAME.json with the results, the machine, the command, the commit and the date; returns its path."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "name": name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": "python -m " + " ".join([_module(), *sys.argv[1:]]),
        "commit": _commit(),
        "machine": machine(),
        "results": dict(results),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _seconds(run: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem


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
    """Commit of the tree, with a "+" where files differ from it; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
