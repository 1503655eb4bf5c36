"""What every benchmark shares: medians of repeated runs, and a JSON record that says where and how they were measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.kernels.bench import record

RESULTS = Path(__file__).parent / "results"


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


def write_record(name: str, results: Mapping[str, Any], folder: Path | None = None) -> Path:
    """As `posttrain.kernels.bench.record.write_record`, into benchmarks/results unless said otherwise."""
    return record.write_record(name, results, folder or RESULTS)


def _seconds(run: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
