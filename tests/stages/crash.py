"""Ending a training run in its middle, in the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from posttrain.stages import run
from posttrain.stages.job import StageJob
from posttrain.stages.trainer import StageTrainer


class Crash(Exception):
    """Stands for whatever ended the process."""


class CrashAt(TrainerCallback):
    """Raises before the step that follows optimizer step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Crash


def train_and_crash(job: StageJob, folder: Path, step: int) -> None:
    """Train until `step` steps are done, then crash."""
    original = StageTrainer.__init__

    def with_crash(self: StageTrainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(CrashAt(step))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(StageTrainer, "__init__", with_crash)
        run.train(job, folder)


def weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of a model folder."""
    return load_file(folder / "model.safetensors")


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not bit-identical in both folders."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return [name for name in first if not first[name].equal(second[name])]
