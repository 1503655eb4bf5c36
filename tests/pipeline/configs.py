"""Small valid configs for tests of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.config.schema import RunConfig

STEPS = "tests.pipeline.fake_steps"


def sft(init: str = "base", **options: Any) -> dict[str, Any]:
    """A stage that trains on demonstrations."""
    return {"kind": "sft", "init": init, "data": {"sums/train": 1.0}, "steps": 2, **options}


def make_config(folder: Path, stages: dict[str, Any], **sections: Any) -> RunConfig:
    """A run below `folder` with the given stages."""
    return RunConfig.model_validate(
        {
            "name": "run",
            "output_dir": str(folder),
            "sources": {"sums": {"kind": "reasoning_gym", "task": "chain_sum", "splits": {"train": 8, "test": 4}}},
            "eval": {"source": "sums/test"},
            "stages": stages,
            **sections,
        }
    )
