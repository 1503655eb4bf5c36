"""Which part of the config a node depends on: its hash decides whether a finished node is still good."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.config.machine_checks import rollout_engine
from posttrain.config.schema import RunConfig
from posttrain.pipeline.graph import Node
from posttrain.pipeline.hashing import hash_file, hash_json

BOOKKEEPING = {"save_steps", "keep_checkpoints", "logging_steps"}
"""Options of a stage that change no weight."""

TRAINING_ONLY = BOOKKEEPING | {
    "optim",
    "beta",
    "sft_weight",
    "center_coefficient",
    "objective",
    "scale_advantages",
    "balance_advantages",
    "clip_ratio_low",
    "clip_ratio_high",
    "negative_ratio_cap",
    "is_weight_cap",
    "kl_coef",
    "shuffle_rewards",
}
"""Options of a stage that its data does not depend on."""


def config_hash(config: RunConfig, node: Node) -> str:
    """Hash of all that the node depends on besides its parents and the code, hex.

    Files outside the run (data files, the checkpoint to start from) are part of it, so that a changed file redoes the node.
    """
    return hash_json(config_part(config, node))


def config_part(config: RunConfig, node: Node) -> dict[str, Any]:
    """The options that the node depends on, as JSON values."""
    part: dict[str, Any] = {"step": node.step, "seed": config.seed, "model": config.model.model_dump(mode="json")}
    if node.step == "make_base":
        part["model_files"] = _fingerprint(config.model.path)
        if config.model.path is None:
            part["tokenizer"] = config.tokenizer.model_dump(mode="json")
            part["sources"] = _sources(config, config.sources)
            # Texts are taken split by split, a source's up to a number; held-out prompts are in no split but their own.
            part["tokenizer_data"] = list(dict.fromkeys(ref for stage in config.stages.values() for ref in stage.data))
            part["eval_source"] = config.eval.source
        return part
    if node.step == "evaluate":
        part["eval"] = config.eval.model_dump(mode="json")
        part["sources"] = _sources(config, [config.eval.source])
    if node.step in ("prepare", "train"):
        stage = _ordered(config.stages[node.stage].model_dump(mode="json"), "data", "heldout")
        ignored = TRAINING_ONLY if node.step == "prepare" else BOOKKEEPING
        part["stage"] = {key: value for key, value in stage.items() if key not in ignored}
        # Held-out prompts are left out of every split, so the data depends on the evaluation's source too.
        refs = [ref for ref, _ in [*stage["data"], *stage.get("heldout", [])]]
        part["sources"] = _sources(config, [*refs, config.eval.source])
        part["eval_source"] = config.eval.source
    if node.step in ("prepare", "evaluate") or config.stages[node.stage].kind == "rl":
        part["engine"] = rollout_engine(config)
    if node.step == "train":
        resources = config.resources
        part["resources"] = [resources.num_workers, resources.gpus_per_worker, resources.zero_stage]
    return part


def _sources(config: RunConfig, refs: Iterable[str]) -> dict[str, Any]:
    """Sections of the sources that "SOURCE/SPLIT" references name, with hashes of their files."""
    found: dict[str, Any] = {}
    names = {ref.split("/")[0] for ref in refs}
    # Sources left out belong to it, and what those leave out in turn; each names only sources above it.
    for name in reversed(config.sources):
        if name in names:
            names.update(config.sources[name].disjoint_from)
    for name in sorted(names):
        source = config.sources[name]
        found[name] = _ordered(source.model_dump(mode="json"), "splits")
        if source.kind in ("jsonl", "parquet") and source.path is not None and Path(source.path).is_file():
            found[name]["file"] = hash_file(Path(source.path))
    return found


def _ordered(section: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The section with these mappings as lists of pairs: their order changes the result, and hashing sorts keys."""
    return {key: list(map(list, value.items())) if key in keys else value for key, value in section.items()}


def _fingerprint(path: str | None) -> list[list[Any]] | None:
    """Names, sizes and times of a checkpoint's files; hashing hundreds of gigabytes on every start would cost minutes."""
    if path is None:
        return None
    folder = Path(path)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [[file.relative_to(folder).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
