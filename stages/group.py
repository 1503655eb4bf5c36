"""The group of training processes: what the ranks need to agree on. Without torch.distributed, a group of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether a process group is running."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process in the group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Processes in the group."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait for every rank."""
    if is_distributed():
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Rank 0's value (any picklable one), on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value (any picklable one), in the order of ranks, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the ranks, on every rank; the given tensor is changed."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor
