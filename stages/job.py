"""What a stage is told: its settings and the folders it reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.config.schema import AnyStage, RunConfig


@dataclass(frozen=True)
class StageJob:
    """One stage of a run; all that `prepare`, `train` and `evaluate` know beside their output folder.

    Attributes:
        name: key in `config.stages`, or "base" for the first model.
        config: the run's settings.
        folder: the stage's own folder; checkpoints and caches lie here.
        inputs: role -> folder. "init": model to start from (and reference of preference learning and RL). "reward":
            reward model of the learned level. "data": what `prepare` wrote (for `train`, and for `evaluate` of a reward
            stage). "model": what `train` wrote (for `evaluate`).
        metrics_path: metrics.jsonl of the run.
        time_limit: seconds of preparation and training together after which training ends, or None.
    """

    name: str
    config: RunConfig
    folder: Path
    inputs: Mapping[str, Path]
    metrics_path: Path
    time_limit: float | None = None

    @property
    def stage(self) -> AnyStage:
        """The stage's section of the config; KeyError for "base"."""
        return self.config.stages[self.name]

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.folder / "checkpoints"
