"""Trains a stage on one of several gloo ranks under ZeRO-3 and publishes its weights from inside, as online RL does.

`python zero3_worker.py FOLDER STAGE.json RESOURCES.json SCHEME`. Rank 0 publishes into FOLDER/published and writes
FOLDER/published.json (folder, digest); the others go through the groups. At the end each rank also fills an embedded engine.
FOLDER/rank-R.json lists the tensors that differ from those that DeepSpeed itself gathers, one by one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from posttrain.model.loading import empty_model
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.weights.source import ModelSource
from posttrain.rollout.weights.store import publish
from posttrain.stages import run
from posttrain.stages.trainer import StageTrainer
from tests.stages.tasks import make_job


class Publish(TrainerCallback):
    """After the last step."""

    def __init__(self, trainer: StageTrainer, folder: Path, scheme: Any) -> None:
        self.trainer, self.folder, self.scheme = trainer, folder, scheme

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        source = ModelSource(self.trainer.model_wrapped, state.global_step, self.scheme)
        rank = dist.get_rank()
        if rank == 0:
            root = self.folder / "published"
            root.mkdir()
            stored = publish(source, root)
            text = json.dumps({"folder": str(stored.folder), "digest": stored.manifest.digest})
            (self.folder / "published.json").write_text(text)
        else:
            source.walk()
        engine = EmbeddedEngine(empty_model(self.trainer.model.config).to_empty(device="cpu"))
        engine.update_weights(ModelSource(self.trainer.model_wrapped, 9))
        own, wrong = engine.model.state_dict(), []
        for name, parameter in self.trainer.model.named_parameters():
            assert parameter.numel() == 0 and hasattr(parameter, "ds_tensor"), f"{name} is not partitioned any more"
            with deepspeed.zero.GatheredParameters([parameter]):
                if not own[name].equal(parameter.detach()):
                    wrong.append(name)
        (self.folder / f"rank-{rank}.json").write_text(json.dumps({"wrong": wrong, "version": engine.weight_version}))


def main() -> None:
    folder, stage, resources, scheme = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    original = StageTrainer.__init__

    def with_publish(self: StageTrainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Publish(self, folder, scheme))

    StageTrainer.__init__ = with_publish  # type: ignore[method-assign]
    run.train(make_job(folder, stage, **resources), folder / "model")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
