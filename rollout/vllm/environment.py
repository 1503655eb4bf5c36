"""Variables that vLLM reads when it is imported; what the user has set stays."""

from __future__ import annotations

import os

DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # what a command answers goes to stdout, and nothing else
    # Its own binding takes whole cores; a trainer and other engines run beside it.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def set_environment(*, own_process: bool) -> None:
    """Set what an engine needs, before vLLM is imported.

    Args:
        own_process: whether vLLM's loop runs in a process of its own; what the user has set wins here too.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if own_process else "0")
