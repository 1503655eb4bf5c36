"""The nodes of a run: for the first model `base` and `base.eval`, for every stage NAME `NAME.data`, `NAME` and `NAME.eval`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from posttrain.config.graph import BASE, stage_dependencies, stage_order
from posttrain.config.schema import RunConfig
from posttrain.pipeline.artifacts import Kind

Step = Literal["make_base", "prepare", "train", "evaluate"]

KINDS: dict[Step, Kind] = {"make_base": "model", "prepare": "dataset", "train": "model", "evaluate": "metrics"}
FOLDERS: dict[Step, str] = {"make_base": "model", "prepare": "data", "train": "model", "evaluate": "eval"}
"""Folder of a node's artifact inside its stage's folder."""


@dataclass(frozen=True)
class Node:
    """One piece of work.

    Attributes:
        name: "base", "sft_short.data", "sft_short", "sft_short.eval".
        stage: key in `config.stages`, or "base".
        step: the function of `posttrain.stages.run` that does it.
        inputs: role -> node whose artifact folder the step reads.
        timer: stage whose wall time bounds this one; it must be done before.
    """

    name: str
    stage: str
    step: Step
    inputs: Mapping[str, str]
    timer: str | None = None

    @property
    def kind(self) -> Kind:
        """Kind of the artifact that the node makes."""
        return KINDS[self.step]

    @property
    def parents(self) -> tuple[str, ...]:
        """Nodes that must be done before, each once."""
        timer = () if self.timer is None else (self.timer, f"{self.timer}.data")
        return tuple(dict.fromkeys((*self.inputs.values(), *timer)))


def build_graph(config: RunConfig) -> dict[str, Node]:
    """All nodes of a run, each after its parents."""
    nodes = [Node(BASE, BASE, "make_base", {}), Node(f"{BASE}.eval", BASE, "evaluate", {"model": BASE})]
    for name in stage_order(config):
        needs = stage_dependencies(config, name)
        timer = needs.pop("timer", None)
        data = f"{name}.data"
        nodes.append(Node(data, name, "prepare", needs, timer))
        nodes.append(Node(name, name, "train", {**needs, "data": data}, timer))
        nodes.append(Node(f"{name}.eval", name, "evaluate", {"model": name, "data": data}))
    return {node.name: node for node in nodes}


def ancestors(graph: Mapping[str, Node], names: Iterable[str]) -> set[str]:
    """The named nodes and all that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph[name].parents)
    return found


def descendants(graph: Mapping[str, Node], names: Iterable[str]) -> set[str]:
    """The named nodes and all that need them."""
    found = set(names)
    for node in graph.values():  # parents come first, so one pass is enough
        if found.intersection(node.parents):
            found.add(node.name)
    return found


def nodes_of(graph: Mapping[str, Node], stage: str) -> list[str]:
    """Names of a stage's nodes, in order."""
    return [node.name for node in graph.values() if node.stage == stage]
