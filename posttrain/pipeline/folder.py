"""The folder of a run: config, manifest, metrics, stages; used by one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

from posttrain.config.errors import UserError
from posttrain.pipeline.artifacts import Artifact, read_artifact
from posttrain.pipeline.files import write_atomically, write_json_atomically
from posttrain.pipeline.graph import FOLDERS, Node

State = Literal["pending", "running", "done", "failed", "skipped"]

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "deepspeed",
    "ray",
    "datasets",
    "tokenizers",
    "safetensors",
    "reasoning-gym",
    "numpy",
)

WORKER_DEADLINE = 30.0
"""Seconds that workers of a killed run have to notice that it is gone."""


class RunFolder:
    """Paths and records of a run.

    RUN/run.yaml, manifest.json, metrics.jsonl, stages/NN-NAME/{data,model,eval,checkpoints,logs}, report.html.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._lock: IO[str] | None = None

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of a run that was started before; UserError when it is not one."""
        folder = cls(path)
        if not folder.manifest_path.is_file():
            raise UserError(
                "is not the folder of a run (no manifest.json)", where=str(path), instead="give OUTPUT_DIR/NAME of a started run"
            )
        return folder

    @property
    def config_path(self) -> Path:
        """The resolved config, all defaults written out."""
        return self.path / "run.yaml"

    @property
    def manifest_path(self) -> Path:
        """States, artifacts, versions."""
        return self.path / "manifest.json"

    @property
    def metrics_path(self) -> Path:
        """A line a record: step, stage, name, value, time."""
        return self.path / "metrics.jsonl"

    @property
    def worker_lock_path(self) -> Path:
        """Held, shared, by every worker that writes into the folder."""
        return self.path / ".workers.lock"

    def stage_folder(self, stage: str) -> Path:
        """Folder of a stage: the existing one, else stages/NN-NAME with the next free number."""
        stages = self.path / "stages"
        numbered = [(int(found[1]), path) for path in stages.glob("*") if (found := re.match(r"(\d+)-(.+)$", path.name))]
        for _, path in sorted(numbered):
            if path.name.split("-", 1)[1] == stage:
                return path
        return stages / f"{max((number for number, _ in numbered), default=-1) + 1:02d}-{stage}"

    def make_stage_folder(self, stage: str) -> Path:
        """`stage_folder`, made with its `logs`."""
        folder = self.stage_folder(stage)
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        return folder

    def node_folder(self, node: Node) -> Path:
        """Folder of a node's artifact."""
        return self.stage_folder(node.stage) / FOLDERS[node.step]

    def artifact(self, node: Node) -> Artifact | None:
        """What the node left behind, None when it never finished; UserError when its record is damaged."""
        return read_artifact(self.node_folder(node))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder. The lock goes with the process that holds it, however that ends.

        Raises:
            UserError: another process runs on the folder, or workers of a killed one still write to it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                raise UserError(
                    f"another process (pid {owner}) runs on this folder",
                    where=str(self.path),
                    instead="wait for it, or give another name=",
                ) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            self._wait_for_workers()
            yield

    def _wait_for_workers(self) -> None:
        """Wait until no worker of an earlier, killed run writes here any more."""
        deadline = time.monotonic() + WORKER_DEADLINE
        with self.worker_lock_path.open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise UserError(
                            "workers of an earlier run still write to this folder",
                            where=str(self.path),
                            instead="end them (`ray stop`)",
                        ) from error
                    time.sleep(0.2)

    def write_config(self, text: str) -> None:
        """Replace run.yaml."""
        write_atomically(self.config_path, text)

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, {} before the first one."""
        try:
            return json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError("manifest is damaged", where=str(self.manifest_path), instead="remove it and run again") from error

    def write_manifest(
        self, graph: Mapping[str, Node], states: Mapping[str, State], artifacts: Mapping[str, Artifact], *, name: str, seed: int
    ) -> None:
        """Replace the manifest."""
        nodes = {
            node.name: {
                "stage": node.stage,
                "step": node.step,
                "state": states[node.name],
                "inputs": dict(node.inputs),
                "parents": list(node.parents),
                "folder": self.node_folder(node).relative_to(self.path).as_posix(),
                "artifact": _without_files(artifacts.get(node.name)),
            }
            for node in graph.values()
        }
        manifest = {
            "name": name,
            "seed": seed,
            "written": time.time(),
            "nodes": nodes,
            "versions": versions(),
            "git_commit": git_commit(),
        }
        write_json_atomically(self.manifest_path, manifest)


def _without_files(artifact: Artifact | None) -> dict[str, Any] | None:
    return None if artifact is None else {key: value for key, value in asdict(artifact).items() if key != "files"}


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries below it, without importing them."""
    import platform

    from posttrain import __version__

    found = {"python": platform.python_version(), "posttrain": __version__}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the checkout that the package is imported from, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
