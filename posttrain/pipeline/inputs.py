"""What comes from outside the run, looked at before anything starts: data files and the checkpoint to start from."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.config.schema import RewardStage, RunConfig
from posttrain.pipeline.graph import Node


def check_inputs(config: RunConfig, nodes: Iterable[Node]) -> None:
    """Read what these nodes will read, as far as that is quick: files, but no generators and no datasets of the hub.

    Imports no torch. The steps check again what they load, and more.

    Args:
        nodes: those still to do; the inputs of finished ones are not read any more.

    Raises:
        UserError: the first mistake, with its file and line where it has one.
    """
    nodes = list(nodes)
    if config.model.path is not None and any(node.step == "make_base" for node in nodes):
        from posttrain.data.tokenizer_files import check_tokenizer_files
        from posttrain.model.checkpoint_files import check_checkpoint

        check_checkpoint(config.model.path)
        check_tokenizer_files(config.model.path)
    refs = dict.fromkeys(ref for node in nodes for ref in references(config, node))
    if refs and any(source.path is not None for source in config.sources.values()):
        from posttrain.data.sources import check_files

        check_files(config, refs, dict.fromkeys(ref for node in nodes for ref in answered(config, node)))


def references(config: RunConfig, node: Node) -> list[str]:
    """SOURCE/SPLIT of all records that a node loads; training takes what the stage's preparation wrote."""
    stage = config.stages.get(node.stage)
    if node.step == "make_base" and config.model.path is None:  # the tokenizer is trained on the stages' records
        return [ref for other in config.stages.values() for ref in other.data]
    if node.step == "evaluate" and not isinstance(stage, RewardStage):
        return [config.eval.source]
    if node.step == "prepare" and stage is not None:
        return [*stage.data, *(stage.heldout if isinstance(stage, RewardStage) else ())]
    return []


def answered(config: RunConfig, node: Node) -> list[str]:
    """Those of `references` whose every record the model answers and a verifier scores."""
    stage = config.stages.get(node.stage)
    return references(config, node) if node.step == "evaluate" or (stage is not None and stage.kind == "rl") else []
