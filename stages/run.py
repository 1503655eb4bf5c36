"""The three functions of a stage, and the one that makes the first model: what the pipeline calls."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import posttrain.model.registration  # noqa: F401 (the Auto classes of tokenizers and peers learn the model)
from posttrain.stages.base import make_base_model
from posttrain.stages.evaluate import evaluate_stage
from posttrain.stages.files import write_json
from posttrain.stages.job import StageJob

# Looked up when a stage runs: importing every trainer (TRL, datasets) takes seconds.
_PREPARE = {
    "sft": ("prepare", "prepare_sft"),
    "dpo": ("prepare", "prepare_dpo"),
    "reward": ("reward", "prepare_reward"),
    "rl": ("prepare", "prepare_rl"),
}
_TRAIN = {
    "sft": ("sft", "train_sft"),
    "dpo": ("dpo", "train_dpo"),
    "reward": ("reward", "train_reward"),
    "rl": ("rl", "train_rl"),
}


def prepare(job: StageJob, folder: Path) -> None:
    """Write the stage's data into `folder`: records.jsonl (a reward stage also heldout.jsonl) and stats.json. One process."""
    started = time.monotonic()
    stats = _look_up(*_PREPARE[job.stage.kind])(job, folder)
    write_json(folder / "stats.json", {**stats, "seconds": time.monotonic() - started})


def train(job: StageJob, folder: Path) -> None:
    """Train the stage on every rank of the running process group, or alone; write model and tokenizer into `folder`.

    Goes on from the stage's last complete checkpoint.
    """
    _look_up(*_TRAIN[job.stage.kind])(job, folder)


def evaluate(job: StageJob, folder: Path) -> None:
    """Write eval.json for the model in `inputs["model"]` into `folder`. One process."""
    evaluate_stage(job, folder)


def make_base(job: StageJob, folder: Path) -> None:
    """Write the tokenizer and the model that the run starts from into `folder`. One process."""
    make_base_model(job, folder)


def _look_up(module: str, function: str) -> Callable[[StageJob, Path], Any]:
    found: Callable[[StageJob, Path], Any] = getattr(importlib.import_module(f"posttrain.stages.{module}"), function)
    return found
