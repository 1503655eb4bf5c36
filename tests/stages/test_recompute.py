"""Gradient checkpointing computes parts of the model twice and changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.checkpoint import checkpoint

from posttrain.model.loading import load_config
from posttrain.stages import run
from tests.stages.crash import differing
from tests.stages.tasks import DPO, REWARD, RL, SFT, make_job

KINDS = {"sft": SFT, "dpo": DPO, "rl": RL, "reward": REWARD}


@pytest.mark.parametrize("stage", KINDS.values(), ids=KINDS)
def test_recomputing_gives_the_same_bits(tmp_path: Path, stage: dict[str, Any]) -> None:
    kept = make_job(tmp_path / "kept", {**stage, "steps": 2})
    run.train(kept, kept.inputs["model"])
    for what in ("attention", "block"):
        job = make_job(tmp_path / what, {**stage, "steps": 2, "gradient_checkpointing": what})
        run.train(job, job.inputs["model"])
        assert differing(kept.inputs["model"], job.inputs["model"]) == []


def test_every_block_of_every_pack_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counting)
    job = make_job(tmp_path, {**SFT, "steps": 2, "gradient_checkpointing": "block"})
    run.train(job, job.inputs["model"])
    assert len(calls) == 2 * SFT["batch_size"] * load_config(job.inputs["init"]).num_hidden_layers
