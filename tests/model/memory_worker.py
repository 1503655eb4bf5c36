"""Runs one action and prints the most anonymous resident memory seen meanwhile, in MiB: `python memory_worker.py ACTION ARG...`.

Actions: `convert SRC DST SCHEME`, `load SRC`. RssAnon of /proc/self/status is sampled every 2 ms; the first number is what it
was before the action, the second the peak.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch

from posttrain.model.convert import convert
from posttrain.model.loading import load_causal_lm


def anonymous() -> float:
    """MiB of anonymous resident memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def main() -> None:
    torch.set_num_threads(1)
    before = peak = anonymous()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    if sys.argv[1] == "convert":
        convert(sys.argv[2], sys.argv[3], sys.argv[4])  # type: ignore[arg-type]
    else:
        model = load_causal_lm(sys.argv[2])
        assert not any(parameter.is_meta for parameter in model.parameters())
    peak = max(peak, anonymous())
    done.set()
    thread.join()
    print(before, peak)


if __name__ == "__main__":
    main()
