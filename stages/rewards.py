"""The stage's reward, put together from its section of the config, and the note of which one it was."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from posttrain.config.schema import RewardSection
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_reward_model
from posttrain.reward.guards.provenance import Provenance
from posttrain.reward.hierarchy import HierarchicalReward
from posttrain.reward.learned import LearnedLevel
from posttrain.reward.types import RewardModel
from posttrain.stages import group
from posttrain.stages.checkpoints import MANIFEST, PREFIX
from posttrain.stages.devices import placed
from posttrain.stages.files import read_json, write_json
from posttrain.stages.first_rank import from_first_rank
from posttrain.stages.job import StageJob

PROVENANCE = "reward.json"
"""File in the stage's folder that says which reward the stage was trained with."""


@contextmanager
def build_reward(job: StageJob, section: RewardSection) -> Iterator[RewardModel]:
    """The hierarchy of a stage: verifiers and rules, the section's judges, and the learned level of `inputs["reward"]`.

    With `actor_gpus` it lives in one Ray actor for all ranks. Enter and leave on every rank: the actor ends with the block.
    """
    folder = _model_folder(job, section)
    if section.actor_gpus is None:
        yield load_reward(folder, section)
        return
    from posttrain.reward.actor import ServiceResources, serve_reward

    environment = {"OMP_NUM_THREADS": str(job.config.resources.cpus_per_worker)}
    if not section.actor_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from an actor that asks for none
    # Of this attempt alone: one that starts after a failure must not join an actor that is about to end.
    attempt = group.broadcast(f"{os.getpid()} {time.time_ns()}")
    client = serve_reward(
        partial(_load_in, Path.cwd(), folder, section),
        name=f"reward of {job.folder.absolute()}, attempt {attempt}",
        resources=ServiceResources(gpus=section.actor_gpus, environment=environment),
    )
    alone = group.world_size() == 1
    through = False
    try:
        yield client
        group.barrier()  # the other ranks may still be scoring
        through = True
    finally:
        # A rank that fails neither waits for the others nor takes the actor from them: their error would hide its own. Ray Train
        # then ends all ranks, and the actor ends with the one that started it.
        if group.rank() == 0 and (through or alone):
            client.close()


def load_reward(folder: Path | None, section: RewardSection) -> HierarchicalReward:
    """The hierarchy of a section.

    Args:
        folder: of the reward model, None without a learned level.
        section: how evidence is composed, and which judges are asked.
    """
    learned = None
    if folder is not None:
        learned = LearnedLevel(placed(load_reward_model(folder)), load_tokenizer(folder))
    if not section.judges:
        return HierarchicalReward(section, learned)
    from posttrain.reward.judges import build_judges  # an HTTP client, which few stages need

    return HierarchicalReward(section, learned, build_judges(section.judges))


def _load_in(directory: Path, folder: Path | None, section: RewardSection) -> HierarchicalReward:
    """`load_reward` where the config's relative paths start."""
    os.chdir(directory)
    return load_reward(folder, section)


def note_provenance(job: StageJob, section: RewardSection) -> None:
    """Write the stage's `reward.json`: hash of the reward model, section, versions."""
    write_json(job.folder / PROVENANCE, _provenance(job, section).to_json())


def pin_provenance(job: StageJob, section: RewardSection) -> None:
    """The same for training; a stage that goes on from a checkpoint must go on with the model that it began with.

    Call on every rank.

    Raises:
        UserError, OSError: the reward model is another one, or the note cannot be read or written; on every rank.
    """
    from_first_rank(partial(_pin, job, section))


def _pin(job: StageJob, section: RewardSection) -> None:
    path = job.folder / PROVENANCE
    found = _provenance(job, section)
    if path.exists() and any(job.checkpoints.glob(f"{PREFIX}*/{MANIFEST}")):
        found.require_same_model(read_json(path), str(path))
    else:
        write_json(path, found.to_json())


def _provenance(job: StageJob, section: RewardSection) -> Provenance:
    return Provenance.of(_model_folder(job, section), section.model_dump(mode="json"))


def _model_folder(job: StageJob, section: RewardSection) -> Path | None:
    return None if section.model is None else job.inputs["reward"]
