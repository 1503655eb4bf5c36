"""A Ray for one command: started on this machine and stopped afterwards, or a running cluster that is only joined."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from posttrain.cluster.environment import set_driver_environment
from posttrain.config.errors import UserError

PARENT, PREFIX = "/tmp", "posttrain-"

OBJECT_STORE_BYTES = 128 * 2**20
"""Only work orders and exceptions go through the object store; data goes through files."""


@dataclass(frozen=True)
class Capacity:
    """What all nodes of the Ray cluster have together."""

    cpus: int
    gpus: int


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def ray_cluster(address: str | None, *, cpus: int | None = None) -> Iterator[Capacity]:
    """Ray for the time of the block. One that this process has joined already is used as it is, and left running.

    Args:
        address: a running cluster to join; None starts one here and stops it afterwards.
        cpus: cores of a Ray that is started here; None takes all that this process may use.

    Yields:
        what the cluster has.

    Raises:
        UserError: no cluster answers at the address.
    """
    set_driver_environment(local=address is None)
    import ray

    if ray.is_initialized():
        yield _capacity()
        return
    folder = None
    try:
        if address is None:
            # Sockets lie below this folder, and their paths may have 107 bytes: TMPDIR can be too long.
            _remove_leftovers()
            folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=PARENT)
            ray.init(
                address="local",
                num_cpus=cpus if cpus is not None else available_cpus(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder,
            )
        else:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"no Ray cluster answers at '{address}'",
                    where="resources.address",
                    instead="start one (`ray start --head`), or write null",
                ) from error
        yield _capacity()
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove the folders of commands that were killed: their Ray has gone with them."""
    for folder in Path(PARENT).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _capacity() -> Capacity:
    import ray

    total = ray.cluster_resources()
    return Capacity(int(total.get("CPU", 0)), int(total.get("GPU", 0)))
