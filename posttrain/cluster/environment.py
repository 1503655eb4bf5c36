"""Environment variables and threads of Ray's processes and of ours on it."""

from __future__ import annotations

import os
import random
import sys

DRIVER_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers keep the directory that the command was started in: paths in a config are relative to it.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # A controller looks at its workers this often; the default of 2 s is added to every stage.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    # Four processes of a stage import torch at once, on a busy two-core machine for longer than the default of 60 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # Without it Ray lets a task of no GPUs see all that its machine has.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
LOCAL_DEFAULTS = {
    # Watches for nodes that a cloud takes back: one process more a stage, and this machine stays.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def set_driver_environment(*, local: bool) -> None:
    """Set what is not set yet; before the first import of ray."""
    for name, value in {**DRIVER_DEFAULTS, **(LOCAL_DEFAULTS if local else {})}.items():
        os.environ.setdefault(name, value)


def hide_gpus() -> None:
    """Let this process see no GPU; before torch first looks for one. A cluster that is joined has its own settings of Ray."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def set_threads(threads: int) -> None:
    """Let this process compute with as many threads, whether torch is loaded already or comes later."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def set_seeds(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (numpy's and torch's when they are loaded)."""
    random.seed(seed)
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed(seed % 2**32)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(seed)
