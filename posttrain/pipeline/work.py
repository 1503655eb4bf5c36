"""What happens inside a Ray worker: one step of one stage, with its log, threads and seeds."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from posttrain.cluster.environment import hide_gpus, set_seeds, set_threads
from posttrain.config.schema import RunConfig
from posttrain.pipeline.failures import rank_log

if TYPE_CHECKING:
    from posttrain.stages.job import StageJob

DEFAULT_STEPS = "posttrain.stages.run"


class Steps(Protocol):
    """The functions that a graph calls, each a pure function of folders; a module with these names is one."""

    def make_base(self, job: StageJob, folder: Path) -> None:
        """Write tokenizer and first model into `folder`."""

    def prepare(self, job: StageJob, folder: Path) -> None:
        """Write the stage's records into `folder`."""

    def train(self, job: StageJob, folder: Path) -> None:
        """Train, on every rank of the default process group; the final model goes into `folder`."""

    def evaluate(self, job: StageJob, folder: Path) -> None:
        """Write `eval.json` into `folder`."""


@dataclass(frozen=True)
class WorkOrder:
    """A node as it is sent to a worker.

    Attributes:
        steps: module of the functions, imported in the worker.
        step: name of the function.
        job: arguments of StageJob.
        folder: where the artifact's files go.
        threads: threads of the worker.
        gpus: whether the worker may use a GPU.
        log: log file; rank r > 0 writes to NAME-rank<r>.log beside it.
        lock: file held while the worker writes.
        directory: working directory, that the config's paths are relative to.
    """

    steps: str
    step: str
    job: Mapping[str, Any]
    folder: Path
    threads: int
    gpus: bool
    log: Path
    lock: Path
    directory: Path

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return cast(RunConfig, self.job["config"])


def load_steps(module: str) -> Steps:
    """The module as `Steps`."""
    return cast(Steps, importlib.import_module(module))


def execute(order: WorkOrder, rank: int = 0) -> None:
    """Do the step in this process. What it raises goes to the log, and on to the driver."""
    if not order.gpus:
        hide_gpus()
    if order.directory.is_dir():
        os.chdir(order.directory)
    log = rank_log(order.log, rank)
    with _held(order.lock), _logged(log):
        try:
            set_threads(order.threads)
            steps = load_steps(order.steps)
            from posttrain.stages.job import StageJob

            set_threads(order.threads)  # once more: importing the steps loaded torch
            set_seeds(order.config.seed)
            order.folder.mkdir(parents=True, exist_ok=True)
            getattr(steps, order.step)(StageJob(**order.job), order.folder)
        except BaseException:
            traceback.print_exc()
            raise


def train_loop(arguments: dict[str, WorkOrder]) -> None:
    """The function that Ray Train runs on every rank; Ray Train has made the process group."""
    import ray.train

    execute(arguments["order"], ray.train.get_context().get_world_rank())
    # Ray Train ends the group of several workers itself, but not a group of one.
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Hold the lock, shared with other workers; a run that starts later waits for it."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def _logged(log: Path) -> Iterator[None]:
    """Send the standard streams, also those of C code, to the end of a log file.

    A full disk must not hide the reason of a failure: the log is then left out.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        for number, _ in saved:
            os.dup2(target, number)
        yield
    finally:
        _flush_unless_full()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
        os.close(target)


def _flush_unless_full() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
