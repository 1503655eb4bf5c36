"""What a run would do, told before anything starts. Imports neither torch nor ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.config.errors import UserError
from posttrain.config.machine_checks import actor_gpus
from posttrain.config.names import nearest
from posttrain.config.schema import RunConfig
from posttrain.pipeline.artifacts import Artifact
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.graph import Node, ancestors, build_graph, descendants, nodes_of
from posttrain.pipeline.hashing import code_hash
from posttrain.pipeline.inputs import check_inputs
from posttrain.pipeline.parts import config_hash

Reason = Literal["done", "new", "config changed", "code changed", "input changed", "redone as asked", "record damaged"]


@dataclass(frozen=True)
class PlanRow:
    """A node as planned.

    Attributes:
        node: its name.
        kind: kind of its artifact.
        parents: nodes it waits for.
        cached: whether the finished artifact is used again.
        reason: why it is used again or (re)done.
        cpus, gpus: what it occupies while it runs, over all its workers and the actor of its reward.
    """

    node: str
    kind: str
    parents: tuple[str, ...]
    cached: bool
    reason: Reason
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Plan:
    """All nodes that a run goes through, in order, and where it writes."""

    folder: Path
    rows: tuple[PlanRow, ...]


@dataclass(frozen=True)
class Selection:
    """The part of the graph that a command runs.

    Attributes:
        graph: all nodes of the config.
        wanted: nodes to have in the end; the rest is left alone.
        forced: nodes to redo although they are done.
    """

    graph: Mapping[str, Node]
    wanted: frozenset[str]
    forced: frozenset[str]


def select(config: RunConfig, *, until: str | None = None, only: str | None = None, from_stage: str | None = None) -> Selection:
    """Choose nodes.

    Args:
        until: run what this stage needs, the stage and its evaluation, and nothing further.
        only: the same; for the commands of a single stage.
        from_stage: redo this stage and what depends on it, although it is done.

    Raises:
        UserError: no such stage, or nothing of `from_stage` is among the nodes up to `until`.
    """
    graph = build_graph(config)
    wanted = set(graph)
    last = only if only is not None else until
    if last is not None:
        _require_stage(config, last)
        wanted = ancestors(graph, nodes_of(graph, last))
        if only is None:
            wanted |= {f"{name}.eval" for name in wanted if graph[name].kind == "model"}
    forced: set[str] = set()
    if from_stage is not None:
        _require_stage(config, from_stage)
        forced = descendants(graph, nodes_of(graph, from_stage))
        if not forced & wanted:
            raise UserError(f"stage '{from_stage}' comes after '{last}'", where="--from", instead="choose an earlier stage")
    return Selection(graph, frozenset(wanted), frozenset(forced & wanted))


def _require_stage(config: RunConfig, name: str) -> None:
    known = ["base", *config.stages]
    if name not in known:
        best = nearest(name, known)
        raise UserError(f"unknown stage '{name}'", instead=f"did you mean '{best}'?" if best else f"known: {', '.join(known)}")


def plan(config: RunConfig, *, until: str | None = None, only: str | None = None, from_stage: str | None = None) -> Plan:
    """What `run` with the same arguments would do.

    Files of artifacts are not hashed here; `run` does that before it uses them.

    Raises:
        UserError: no such stage, or a data file or checkpoint that a node still to do needs is broken.
    """
    selection = select(config, until=until, only=only, from_stage=from_stage)
    folder = RunFolder(Path(config.output_dir) / config.name)
    code = code_hash()
    done: dict[str, Artifact] = {}
    rows = []
    for node in selection.graph.values():
        if node.name not in selection.wanted:
            continue
        reason: Reason = "redone as asked"
        if node.name not in selection.forced:
            reason, artifact = standing(folder, node, done, config_hash(config, node), code)
            if reason == "done" and artifact is not None:
                done[node.name] = artifact
        cpus, gpus = demand(config, node)
        rows.append(PlanRow(node.name, node.kind, node.parents, reason == "done", reason, cpus, gpus))
    check_inputs(config, (selection.graph[row.node] for row in rows if not row.cached))
    return Plan(folder.path, tuple(rows))


def standing(
    folder: RunFolder, node: Node, done: Mapping[str, Artifact], wanted_config: str, code: str
) -> tuple[Reason, Artifact | None]:
    """Whether a node's artifact can be used again, and if not, why.

    Args:
        done: artifacts of the parents that are done; a parent that is missing here will be made anew.
        wanted_config: hash of the config part that the node depends on now.
        code: hash of the sources now.
    """
    try:
        artifact = folder.artifact(node)
    except UserError:
        return "record damaged", None
    if artifact is None:
        return "new", None
    if artifact.config_hash != wanted_config:
        return "config changed", artifact
    if artifact.code_hash != code:
        return "code changed", artifact
    if dict(artifact.parents) != {name: done[name].hash if name in done else None for name in node.parents}:
        return "input changed", artifact
    return "done", artifact


def demand(config: RunConfig, node: Node) -> tuple[int, int]:
    """CPU cores and GPUs that a node occupies while it runs: its workers, and the actor of its reward."""
    cpus, gpus = workers_demand(config, node)
    return cpus, gpus + (actor_gpus(config.stages[node.stage], node.step) if node.step in ("prepare", "train") else 0)


def workers_demand(config: RunConfig, node: Node) -> tuple[int, int]:
    """CPU cores and GPUs of a node's workers alone."""
    resources = config.resources
    workers = resources.num_workers if node.step == "train" else 1
    gpus = 0 if node.step == "make_base" else resources.gpus_per_worker * workers
    return resources.cpus_per_worker * workers, gpus
