"""The engine that a stage draws answers with, as `rollout.engine` says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from posttrain.config.machine_checks import rollout_engine
from posttrain.config.schema import RunConfig
from posttrain.model.loading import load_causal_lm
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.types import RolloutEngine
from posttrain.stages.devices import placed


@contextmanager
def checkpoint_engine(config: RunConfig, folder: Path) -> Iterator[RolloutEngine]:
    """An engine for the model in a folder, closed at the end.

    Args:
        config: says which.
        folder: the checkpoint.

    Raises:
        UserError: it cannot be had here.
    """
    if chosen_engine(config) == "embedded":
        yield EmbeddedEngine(placed(load_causal_lm(folder)).eval())
        return
    engine = vllm_engine(config, folder)
    try:
        yield engine
    finally:
        engine.close()


def chosen_engine(config: RunConfig) -> Literal["embedded", "vllm"]:
    """What `rollout.engine` means in this process: `auto` is vLLM inside a run alone, since its actors are the run's."""
    chosen = rollout_engine(config)
    if chosen == "vllm" and config.rollout.engine == "auto":
        from posttrain.rollout.fleet import ray_runs

        return "vllm" if ray_runs() else "embedded"
    return chosen


def vllm_engine(config: RunConfig, folder: Path) -> RolloutEngine:
    """vLLM in an actor of the run's Ray: this process, which may train, never imports it. Close it.

    Args:
        config: how many threads the engine gets.
        folder: the checkpoint that it starts with.

    Raises:
        UserError: this process is in no run, or vLLM is not installed there.
    """
    from posttrain.rollout.fleet import ActorResources, ray_fleet

    threads = str(config.resources.cpus_per_worker)
    resources = ActorResources(environment=(("OMP_NUM_THREADS", threads), ("CUDA_VISIBLE_DEVICES", "")))
    return ray_fleet(partial(_start_vllm, Path(folder).resolve()), 1, resources=resources)


def _start_vllm(folder: Path) -> Any:
    from posttrain.rollout.vllm.engine import VLLMEngine

    return VLLMEngine(folder, own_process=False)
