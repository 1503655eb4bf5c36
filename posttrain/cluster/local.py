"""A Ray for one command: started on this machine and stopped afterwards, or a running cluster that is only joined."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from posttrain.cluster.environment import set_driver_environment
from posttrain.config.errors import UserError

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
    """Ray for the time of the block.

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

    folder = None
    try:
        if address is None:
            # Sockets lie below this folder, and their paths may have 107 bytes: TMPDIR can be too long.
            folder = tempfile.mkdtemp(prefix="posttrain-", dir="/tmp")
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
                    f"no Ray cluster answers at '{address}'", where="resources.address", instead="start one (`ray start --head`), or write null"
                ) from error
        total = ray.cluster_resources()
        yield Capacity(int(total.get("CPU", 0)), int(total.get("GPU", 0)))
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
