"""Compiles what a comparison needs in many processes at once, before anything is timed.

    python -m posttrain.kernels.bench.compiling PROCESSES GROUPS PEERS

Kernels go into Triton's cache on disk and are not launched. A peer that chooses among configurations has them shared out among
the processes: compiled one after the other, in the process that times, they would take longer than all the measurements.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posttrain.kernels.bench.cases import prepare, select
from posttrain.kernels.bench.peers import PEERS
from posttrain.kernels.bench.rows import Row

MOST_PROCESSES = 16
LONGEST = 32768 * 64
"""Tokens times heads up to which rows are compiled here: larger ones run the same kernels, or compile theirs when timed."""
TUNED_TOKENS = 512


def compile_all(groups: list[str], peers: bool, log: Path, limit: float) -> float:
    """Compile for the rows of some groups, at most `limit` seconds; what is not compiled by then is compiled when timed.

    Returns:
        Seconds taken.
    """
    started = time.monotonic()
    processes = max(1, min(MOST_PROCESSES, os.cpu_count() or 1))
    command = [sys.executable, "-m", __spec__.name, str(processes), ",".join(groups), "1" if peers else "0"]
    with log.open("a", encoding="utf-8") as file:
        # A session of its own, so that its processes end with it.
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    return time.monotonic() - started


def fork(rows: list[Row], processes: int) -> None:
    """Compile in so many forks of this process, which has imported everything and must not have touched the GPU."""
    import triton  # noqa: F401

    context = multiprocessing.get_context("fork")
    running = [context.Process(target=compile_part, args=(rows, part, processes)) for part in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()


def compile_part(rows: list[Row], part: int, parts: int) -> None:
    """This process's share, nothing launched; a line for each."""
    with only_compiling(part, parts):
        for row, contestant in share(rows, part, parts):
            started = time.monotonic()
            # What fails here fails again, and is told, when it is timed.
            with contextlib.suppress(Exception), torch.set_grad_enabled(row.train):
                prepare(row, contestant).run()
            gc.collect()
            torch.cuda.empty_cache()
            print(f"process {part}: {time.monotonic() - started:.1f} s, {row.group}, {row.case}, {contestant}", flush=True)


def share(rows: list[Row], part: int, parts: int) -> list[tuple[Row, str]]:
    """Rows and contestants that one of so many processes compiles: everybody the tuned, each its own of the others."""
    tuned: list[tuple[Row, str]] = []
    others: list[tuple[Row, str]] = []
    for row in rows:
        for name in row.contestants:
            if name in PEERS and PEERS[name].tuned:
                short = replace(row, documents=min(row.documents, 4), tokens=TUNED_TOKENS)
                known = ((found.heads, found.train, found.group == "packed", other) for found, other in tuned)
                if (row.heads, row.train, row.group == "packed", name) not in known:
                    tuned.append((short, name))
            elif row.floor_bytes and row.documents * row.tokens * row.heads <= LONGEST:
                others.append((row, name))
    return others[part::parts] + tuned


@contextlib.contextmanager
def only_compiling(part: int, parts: int) -> Iterator[None]:
    """Triton's kernels are compiled and not launched; an autotuner compiles every `parts`-th of its configurations."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launch, tune = JITFunction.run, Autotuner.run
    tried: set[tuple[Any, ...]] = set()

    def compile_kernel(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    def compile_share(tuner: Any, *args: Any, **options: Any) -> None:
        key = _tuning_key(tuner, args, options)
        if key in tried:  # the tuner will not try its configurations again either
            return
        tried.add(key)
        for config in tuner.configs[part::parts]:
            with contextlib.suppress(Exception):  # one that does not compile is passed over by the tuner too
                tuner.fn.run(*args, **options, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_kernel, compile_share
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = launch, tune


def _tuning_key(tuner: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What a tuner's choice depends on: its keys, and the types of the tensors."""
    named = {**dict(zip(tuner.arg_names, args, strict=False)), **options}
    known = {name: value for name, value in named.items() if name in tuner.arg_names}
    types = tuple(str(value.dtype) for value in known.values() if hasattr(value, "dtype"))
    return (id(tuner), *(known[name] for name in tuner.keys if name in known), *types)


if __name__ == "__main__":
    count, named, with_peers = sys.argv[1:]
    fork(select(named.split(","), with_peers == "1"), int(count))
