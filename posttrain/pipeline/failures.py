"""From what Ray reports about a failed node to the one line that a person reads."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

from posttrain.config.errors import UserError

NEARLY_FULL = 2**20
"""Bytes: with less free space a failed write is put down to the full disk."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")
# The last is what torch says, on leaving the file, where the write before it failed.
WRITE_FAILED_TEXTS = ("PytorchStreamWriter failed", "file write failed", "unexpected pos")


class NodeFailed(RuntimeError):
    """A node raised what is no mistake of the user: a fault of the program, with the worker's trace."""


def explain_failure(error: BaseException, node: str, log: Path) -> Exception:
    """What to raise for a failed node: UserError for what a person can mend, NodeFailed otherwise.

    Args:
        error: what `ray.get` or `TorchTrainer.fit` raised.
        node: name of the node.
        log: its log file; ranks above 0 have theirs beside it.
    """
    failures = {rank: _root(failure) for rank, failure in _by_rank(error).items()}
    for failure in failures.values():
        if isinstance(failure, UserError):
            return failure
    for failure in failures.values():
        if _disk_is_full(failure, log):
            return disk_full(f"stage '{node}': {log.parents[1]}")
    for rank, failure in failures.items():
        if _was_killed(failure):
            return UserError(
                f"worker of rank {rank} was killed (by hand, or because memory ran out)",
                where=f"stage '{node}'",
                instead=f"run again to go on from the last complete checkpoint; log: {log if rank == 0 else rank_log(log, rank)}",
            )
    for rank, failure in failures.items():
        if isinstance(failure, MemoryError) or "CUDA out of memory" in str(failure):
            return UserError(f"rank {rank} ran out of memory", where=f"stage '{node}'", instead="lower pack_length or batch_size")
    rank, failure = next(iter(failures.items()))
    return NodeFailed(f"step '{node}' failed on rank {rank} ({type(failure).__name__}: {failure}); log: {log}")


def disk_full(where: str) -> UserError:
    """The one line about a full disk."""
    return UserError("no space left on the disk", where=where, instead="free some and run again; finished steps are kept")


def rank_log(log: Path, rank: int) -> Path:
    """Log file of a rank; rank 0 has `log` itself."""
    return log if rank == 0 else log.with_name(f"{log.stem}-rank{rank}.log")


def _by_rank(error: BaseException) -> dict[int, BaseException]:
    """Failures of the workers by rank, the lowest first; a task counts as rank 0."""
    failures: Mapping[int, BaseException] | None = getattr(error, "worker_failures", None)
    return dict(sorted(failures.items())) if failures else {0: error}


def _root(error: BaseException) -> BaseException:
    """The exception that the step raised, out of what Ray wrapped around it."""
    for attribute in ("cause", "_base_exc", "controller_failure", "health_check_failure"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            return _root(inner)
    return error


def _disk_is_full(error: BaseException, log: Path) -> bool:
    text = str(error)
    if (isinstance(error, OSError) and error.errno in DISK_FULL) or any(part in text for part in DISK_FULL_TEXTS):
        return True
    return any(part in text for part in WRITE_FAILED_TEXTS) and shutil.disk_usage(log.parent).free < NEARLY_FULL


def _was_killed(error: BaseException) -> bool:
    from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, WorkerCrashedError

    return isinstance(error, ActorDiedError | ActorUnavailableError | NodeDiedError | OutOfMemoryError | WorkerCrashedError)
