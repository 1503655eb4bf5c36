"""A run folder with finished nodes, written by the pipeline's own functions."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.config import RunConfig, dump_config
from posttrain.pipeline.artifacts import Artifact, seal
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.graph import build_graph
from posttrain.pipeline.hashing import code_hash
from posttrain.pipeline.parts import config_hash


def make_run(config: RunConfig, stages: list[str]) -> RunFolder:
    """A run in which the stages given (and the first model, with its evaluation) are done."""
    folder = RunFolder(Path(config.output_dir) / config.name)
    folder.path.mkdir(parents=True)
    folder.write_config(dump_config(config))
    graph, done = build_graph(config), dict[str, Artifact]()
    for node in graph.values():
        if node.stage not in ("base", *stages):
            continue
        folder.make_stage_folder(node.stage)
        target = folder.node_folder(node)
        target.mkdir(parents=True)
        if node.step == "evaluate":
            scores: dict[str, object] = {"heldout_accuracy": 0.625, "num_prompts": 500, "pair_accuracy": None, "samples": []}
            (target / "eval.json").write_text(json.dumps(scores))
        else:
            (target / "content.txt").write_text(node.name)
        done[node.name] = seal(
            folder.path,
            target,
            name=node.name,
            kind=node.kind,
            parents={name: done[name].hash for name in node.parents},
            config_hash=config_hash(config, node),
            code_hash=code_hash(),
            seconds=2.5,
            created=0.0,
        )
    states = {name: "done" if name in done else "pending" for name in graph}
    folder.write_manifest(graph, states, done, name=config.name, seed=config.seed)  # type: ignore[arg-type]
    return folder
