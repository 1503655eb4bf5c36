"""Executing the graph: what is done is skipped, what is ready runs, what fails ends the run with one line."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING

from posttrain.cluster.local import Capacity, ray_cluster
from posttrain.config.errors import UserError
from posttrain.config.loading import dump_config
from posttrain.config.schema import RunConfig
from posttrain.pipeline.artifacts import ARTIFACT_FILE, Artifact, seal
from posttrain.pipeline.failures import disk_full, explain_failure
from posttrain.pipeline.files import write_atomically
from posttrain.pipeline.folder import RunFolder, State
from posttrain.pipeline.graph import Node
from posttrain.pipeline.hashing import code_hash, hash_json
from posttrain.pipeline.launch import launch, preload
from posttrain.pipeline.metrics import MetricsTail, read_stages
from posttrain.pipeline.parts import config_hash
from posttrain.pipeline.plan import Selection, demand, plan, select, standing, workers_demand
from posttrain.pipeline.progress import Progress
from posttrain.pipeline.work import DEFAULT_STEPS, WorkOrder
from posttrain.stages.metrics import log_restart

if TYPE_CHECKING:
    from rich.console import Console

POLL_SECONDS = 0.2

PRELOAD_SECONDS = 60.0
"""Longest wait, at the end of a run that ends in its first seconds, for the imports that go on beside it."""


def run(
    config: RunConfig,
    *,
    until: str | None = None,
    only: str | None = None,
    from_stage: str | None = None,
    console: Console | None = None,
    steps: str = DEFAULT_STEPS,
) -> RunFolder:
    """Execute a run, or the part of it that is not done yet.

    Args:
        until, only, from_stage: see `plan.select`.
        console: where progress goes; None is silent.
        steps: module of the four step functions, imported by the workers.

    Returns:
        the run's folder.

    Raises:
        UserError: a mistake, a killed worker, a full disk, Ctrl-C: one line. Finished nodes are kept and used again.
        NodeFailed: a step raised something else.
    """
    selection = select(config, until=until, only=only, from_stage=from_stage)
    plan(config, until=until, only=only, from_stage=from_stage)  # refuses broken inputs before anything is removed or started
    folder = RunFolder(Path(config.output_dir) / config.name)
    try:
        with folder.locked():
            folder.write_config(dump_config(config))
            execution = Execution(config, selection, folder, Progress(console, config), steps)
            try:
                execution.run()
            finally:
                execution.close()
    except KeyboardInterrupt as error:
        raise UserError("stopped", where=str(folder.path), instead="the same command goes on from here") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise disk_full(str(folder.path)) from error
    return folder


@dataclass
class Execution:
    """One execution of a selection. Nodes wait in `waiting` until their parents are in `done`, and then run in a thread each."""

    config: RunConfig
    selection: Selection
    folder: RunFolder
    progress: Progress
    steps: str
    done: dict[str, Artifact] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    running: dict[str, Node] = field(default_factory=dict)
    failure: Exception | None = None
    finished: Queue[tuple[Node, float, BaseException | None]] = field(default_factory=Queue)

    def __post_init__(self) -> None:
        self.waiting = [node for node in self.selection.graph.values() if node.name in self.selection.wanted]
        self.states = {name: self._earlier_state(node) for name, node in self.selection.graph.items()}
        self.code = code_hash()
        # Once a node: it hashes data files.
        self.config_hashes = {node.name: config_hash(self.config, node) for node in self.waiting}
        self.to_do: set[str] = set()
        self.tail = MetricsTail(self.folder.metrics_path)

    def _earlier_state(self, node: Node) -> State:
        if node.name in self.selection.wanted:
            return "pending"
        return "done" if (self.folder.node_folder(node) / ARTIFACT_FILE).is_file() else "pending"

    def run(self) -> None:
        """Go through all wanted nodes; Ray is started when the first node is not done."""
        self._discard_forced()
        self._skip_done()
        self._record()
        if not self.waiting:
            return
        with ray_cluster(self.config.resources.address) as capacity:
            self._check_resources(capacity)
            preloading = threading.Thread(target=preload, daemon=True, name="preload")
            preloading.start()
            try:
                self._loop(capacity)
            finally:
                # Left alone, it may ask a Ray that is shut down, which ends the process on the spot, or be cut off by the end
                # of the interpreter, which crashes.
                preloading.join(PRELOAD_SECONDS)
                self.progress.stop()
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Leave a manifest that says how it ended."""
        self.progress.stop()
        for name, state in self.states.items():
            if state == "running":
                self.states[name] = "pending"
        try:
            self._record()
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a full disk has been told already, or `run` tells it
                raise

    def _loop(self, capacity: Capacity) -> None:
        while self.running or (self.waiting and self.failure is None):
            if self.failure is None:
                self._skip_done()
                self._start_ready(capacity)
            try:
                self._finish(*self.finished.get(timeout=POLL_SECONDS))
            except Empty:
                pass
            self.progress.update(self.tail.read())
        for node in self.waiting:
            self.states[node.name] = "skipped"

    def _discard_forced(self) -> None:
        """Remove what the user asked to redo, checkpoints included, so that it stays undone if this run is stopped."""
        for node in self.waiting:
            if node.name in self.selection.forced:
                (self.folder.node_folder(node) / ARTIFACT_FILE).unlink(missing_ok=True)
                self._key_path(node).unlink(missing_ok=True)

    def _skip_done(self) -> None:
        """Take over finished artifacts whose inputs, config and code are the same and whose files are whole."""
        for node in list(self.waiting):
            if node.name in self.to_do or any(parent not in self.done for parent in node.parents):
                continue
            artifact = self._usable(node)
            if artifact is None:
                (self.folder.node_folder(node) / ARTIFACT_FILE).unlink(missing_ok=True)
                self.to_do.add(node.name)
                continue
            self.waiting.remove(node)
            self.done[node.name] = artifact
            self.states[node.name] = "done"
            self.progress.skipped(node)

    def _usable(self, node: Node) -> Artifact | None:
        """The node's artifact if it can be used again; says why when there is one that cannot."""
        reason, artifact = standing(self.folder, node, self.done, self.config_hashes[node.name], self.code)
        if reason == "new":
            return None
        if reason != "done" or artifact is None:
            self.progress.note(f"{node.name}: {reason}, so it is done again")
            return None
        try:
            artifact.verify(self.folder.path)
        except UserError as damage:
            self.progress.note(f"warning: {damage.where}: {damage.what}; {node.name} is done again")
            return None
        return artifact

    def _check_resources(self, capacity: Capacity) -> None:
        """Refuse what could never start."""
        for node in self.waiting:
            for need, has, what, option in zip(
                demand(self.config, node), (capacity.cpus, capacity.gpus), ("CPU cores", "GPUs"), ("cpus", "gpus"), strict=True
            ):
                if need > has:
                    change = f"lower num_workers or {option}_per_worker"
                    if option == "gpus" and need > workers_demand(self.config, node)[1]:
                        change += ", or write 0 for the reward's actor_gpus"
                    raise UserError(
                        f"stage '{node.stage}' needs {need} {what} at once, and there are {has}",
                        where="resources",
                        instead=change,
                    )

    def _start_ready(self, capacity: Capacity) -> None:
        """Start nodes whose parents are done, as far as cores and GPUs are free; evaluations wait for training.

        Ray would queue them too, but a `TorchTrainer` that waits for cores gives up after a while.
        """
        ready = [node for node in self.waiting if all(parent in self.done for parent in node.parents)]
        for node in sorted(ready, key=lambda node: node.step == "evaluate"):
            used = [demand(self.config, other) for other in self.running.values()]
            cpus, gpus = demand(self.config, node)
            if sum(use[0] for use in used) + cpus <= capacity.cpus and sum(use[1] for use in used) + gpus <= capacity.gpus:
                self._start(node)

    def _start(self, node: Node) -> None:
        order = self._order(node)
        self._clear(node, order.folder)
        self.waiting.remove(node)
        self.running[node.name] = node
        self.states[node.name] = "running"
        self._record()
        self.progress.started(node)
        threading.Thread(target=self._launch, args=(node, order), daemon=True, name=node.name).start()

    def _launch(self, node: Node, order: WorkOrder) -> None:
        """Body of a node's thread."""
        start = time.perf_counter()
        error: BaseException | None = None
        try:
            launch(self.config, node, order, self.folder.stage_folder(node.stage) / "logs" / "ray")
        except BaseException as raised:  # whatever it is, the main thread decides
            error = raised
        self.finished.put((node, time.perf_counter() - start, error))

    def _order(self, node: Node) -> WorkOrder:
        stage_folder = self.folder.make_stage_folder(node.stage)
        job = {
            "name": node.stage,
            "config": self.config,
            "folder": stage_folder,
            "inputs": {role: self.folder.path / self.done[name].path for role, name in node.inputs.items()},
            "metrics_path": self.folder.metrics_path,
            "time_limit": None if node.timer is None else self._seconds_of(node.timer),
        }
        return WorkOrder(
            steps=self.steps,
            step=node.step,
            job=job,
            folder=self.folder.node_folder(node),
            threads=self.config.resources.cpus_per_worker,
            gpus=workers_demand(self.config, node)[1] > 0,
            log=stage_folder / "logs" / f"{node.step}.log",
            lock=self.folder.worker_lock_path,
            directory=Path.cwd(),
        )

    def _seconds_of(self, stage: str) -> float:
        """Wall time that a stage has cost: its preparation and its training, without the start of the processes."""
        metrics = read_stages(self.folder.metrics_path).get(stage)
        trained = metrics.latest("train_seconds") if metrics is not None else None
        if trained is None:
            raise UserError(f"stage '{stage}' has logged no train_seconds to match", instead=f"run with --from {stage}")
        return trained

    def _key_path(self, node: Node) -> Path:
        return self.folder.stage_folder(node.stage) / f".{node.step}.key"

    def _clear(self, node: Node, folder: Path) -> None:
        """Remove what an unfinished attempt left, but keep checkpoints that were made from the same inputs, config and code."""
        shutil.rmtree(folder, ignore_errors=True)
        if node.step != "train":
            return
        key = hash_json([self.config_hashes[node.name], self.code, {name: self.done[name].hash for name in node.parents}])
        checkpoints = self.folder.stage_folder(node.stage) / "checkpoints"
        path = self._key_path(node)
        if not (path.is_file() and path.read_text(encoding="utf-8") == key):
            shutil.rmtree(checkpoints, ignore_errors=True)
            write_atomically(path, key)
        if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
            log_restart(self.folder.metrics_path, node.stage)

    def _finish(self, node: Node, seconds: float, error: BaseException | None) -> None:
        """Seal a node that is through; the first failure ends the run once those beside it are through."""
        del self.running[node.name]
        if error is None:
            try:
                self._seal(node, seconds)
                return
            except OSError as raised:
                error = raised
        self.states[node.name] = "failed"
        failure = explain_failure(error, node.name, self.folder.stage_folder(node.stage) / "logs" / f"{node.step}.log")
        self.progress.failed(node)
        if self.failure is None:
            self.failure = failure
            if self.running:
                self.progress.note(f"{failure}; waiting for {', '.join(self.running)}")
        self._record()

    def _seal(self, node: Node, seconds: float) -> None:
        artifact = seal(
            self.folder.path,
            self.folder.node_folder(node),
            name=node.name,
            kind=node.kind,
            parents={name: self.done[name].hash for name in node.parents},
            config_hash=self.config_hashes[node.name],
            code_hash=self.code,
            seconds=seconds,
            created=time.time(),
        )
        self.done[node.name] = artifact
        self.states[node.name] = "done"
        if node.step == "train":
            shutil.rmtree(self.folder.stage_folder(node.stage) / "checkpoints", ignore_errors=True)
        self._record()
        self.progress.finished(node, seconds)

    def _record(self) -> None:
        self.folder.write_manifest(self.selection.graph, self.states, self.done, name=self.config.name, seed=self.config.seed)
