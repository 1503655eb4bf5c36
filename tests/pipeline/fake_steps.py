"""The four step functions without a model: what they write is a pure function of their inputs. A file `control.json` beside the
run's folder tells steps to misbehave: {"NODE": {"do": ..., ...}}; `calls.log` there has a line "START|END NODE TIME" a call."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import time
from pathlib import Path

from posttrain.config.errors import UserError
from posttrain.stages.job import StageJob


def make_base(job: StageJob, folder: Path) -> None:
    _step(job, folder, job.name, "model.bin")


def prepare(job: StageJob, folder: Path) -> None:
    _step(job, folder, f"{job.name}.data", "records.jsonl")


def evaluate(job: StageJob, folder: Path) -> None:
    _step(job, folder, f"{job.name}.eval", None)
    samples = [{"prompt": "1 + 1", "answer": f"<{job.name}>", "expected": "2", "right": job.name != "base"}]
    accuracy = 0.1 if job.name == "base" else 0.6
    result = {"heldout_accuracy": accuracy, "num_prompts": 10, "pair_accuracy": None, "samples": samples}
    (folder / "eval.json").write_text(json.dumps(result))


def train(job: StageJob, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    if rank == 0:
        _log(job, {"train_seconds": 2.0, "train_tokens": 100.0})
    _step(job, folder, job.name, "model.bin" if rank == 0 else None, rank)


def _step(job: StageJob, folder: Path, node: str, output: str | None, rank: int = 0) -> None:
    root = job.metrics_path.parents[1]
    control = json.loads((root / "control.json").read_text()).get(node, {}) if (root / "control.json").exists() else {}
    _note(root, "START", node)
    _misbehave(job, control, rank)
    _note(root, "END", node)
    if output is not None:
        (folder / output).write_text(_digest(job))


def _misbehave(job: StageJob, control: dict, rank: int) -> None:
    if control.get("rank", rank) != rank:
        time.sleep(control.get("others", 0))
        return
    match control.get("do"):
        case "sleep":
            time.sleep(control["seconds"])
        case "user error":
            raise UserError("broken line", where="data.jsonl:17", instead="mend it")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "bug":
            raise ZeroDivisionError("a bug")
        case "kill":
            job.checkpoints.mkdir(exist_ok=True)
            (job.checkpoints / "step-5").write_text("5")
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill once":
            if not job.checkpoints.exists():
                job.checkpoints.mkdir()
                (job.checkpoints / "step-5").write_text("5")
                os.kill(os.getpid(), signal.SIGKILL)
        case "world":
            import torch.distributed

            (job.folder / f"world-{rank}").write_text(f"{torch.distributed.get_world_size()} {torch.distributed.get_backend()}")


def _digest(job: StageJob) -> str:
    content = [
        (role, [path.read_text() for path in sorted(folder.iterdir()) if path.name != "artifact.json"])
        for role, folder in sorted(job.inputs.items())
    ]
    stage = job.config.stages.get(job.name)
    return hashlib.sha256(repr((job.config.seed, stage, content)).encode()).hexdigest()


def _note(root: Path, what: str, node: str) -> None:
    with (root / "calls.log").open("a") as file:
        file.write(f"{what} {node} {time.time()}\n")


def _log(job: StageJob, values: dict[str, float]) -> None:
    with job.metrics_path.open("a") as file:
        for step in (1, 2):
            for name, value in {"loss": 1.0 / step, **(values if step == 2 else {})}.items():
                file.write(
                    json.dumps({"step": step, "stage": job.name, "name": name, "value": value, "time": time.time()}) + "\n"
                )
