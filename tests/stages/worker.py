"""Trains one stage in a process of its own: `python worker.py FOLDER STAGE.json RESOURCES.json [KILL_AT_STEP]`.

With RANK and WORLD_SIZE in the environment it is one of a group of gloo workers, be it a group of one, as under Ray
Train. KILL_AT_STEP ends the process by SIGKILL after that optimizer step, as a crash of the machine would.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from posttrain.stages import run
from posttrain.stages.trainer import StageTrainer
from tests.stages.tasks import make_job


class KillAt(TrainerCallback):
    """SIGKILL to the own process after a step, once its checkpoint, if any, is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, stage, resources = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if len(sys.argv) > 4:
        original, step = StageTrainer.__init__, int(sys.argv[4])

        def with_kill(self: StageTrainer, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.add_callback(KillAt(step))

        StageTrainer.__init__ = with_kill  # type: ignore[method-assign]
    job = make_job(folder, stage, **resources)
    run.train(job, folder / "model")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
