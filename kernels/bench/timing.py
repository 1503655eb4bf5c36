"""How a call is timed: medians with a cold L2, and in a CUDA graph where the host would be what is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_MS, TIMED_MS = 20.0, 60.0
LEAST = 5
"""Timed repeats, however long one takes."""
MOST = 400
GRAPH_BELOW_MS = 3.0
"""Calls shorter than this are replayed in a CUDA graph too: one by one, the work of a slow host would show."""
FLUSHED_BYTES = 256 << 20
COPIED_BYTES = 1 << 30


@dataclass
class Prepared:
    """Something ready to be timed.

    Attributes:
        run: makes `calls` calls, on the current stream.
        calls: calls of the operator in one `run`.
        output: what one call computes, in the layout of ours, so that contestants can be compared; None where they are not.
        measure: replaces the timing where something else is measured.
    """

    run: Callable[[], Any]
    calls: int = 1
    output: Callable[[], torch.Tensor] | None = None
    measure: Callable[[], dict[str, Any]] | None = None


def timed(prepared: Prepared) -> dict[str, Any]:
    """Median milliseconds of one call: `ms`, `how` ("graph" or "call"), and `call_ms` where both were taken.

    A call that cannot be captured says so under `no_graph` and keeps the time of calls one by one.
    """
    called = milliseconds(prepared.run) / prepared.calls
    result: dict[str, Any] = {"ms": called, "how": "call"}
    if called >= GRAPH_BELOW_MS:
        return result
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = prepared.run()
        result = {"ms": milliseconds(graph.replay) / prepared.calls, "how": "graph", "call_ms": called}
        del kept
    except Exception as error:  # whatever a contestant raises where it may not wait for the device
        result["no_graph"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return result


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of one run, the L2 filled with something else before each."""
    run()
    once = _events(run, 2)[-1]
    for _ in range(min(MOST, int(WARM_MS / max(once, 1e-3)))):
        run()
    return statistics.median(_events(run, max(LEAST, min(MOST, int(TIMED_MS / max(once, 1e-3))))))


def copy_bandwidth() -> float:
    """Bytes a millisecond of a device-to-device copy of 1 GiB, read and written."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / milliseconds(lambda: target.copy_(source))


def _events(run: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each of so many runs, on the device's clock."""
    other = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(repeats):
        other.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]
