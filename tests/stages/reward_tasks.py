"""Pairs and graded answers whose dimensions a tiny model learns in seconds: the word says correctness, its end says style."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config.schema import RunConfig
from posttrain.stages import run
from posttrain.stages.job import StageJob
from tests.stages.tasks import MODEL, OPTIM

TWO = ["correctness", "style"]
STAGE: dict[str, Any] = {
    "kind": "reward",
    "data": {"pairs": 1.0},
    "heldout": {"held_pairs": 1.0},
    "heldout_pairs": 20,
    "dimensions": TWO,
    "steps": 4,
    "max_length": 64,
    "pack_length": 256,
    "optim": OPTIM,
    "save_steps": 2,
    "keep_checkpoints": 2,
    "logging_steps": 1,
}
WORDS, ENDS = ("yes", "no"), ("!", "?")
"""The better one first."""
HELD = [n for n in range(80) if n // 4 % 4 == 3]
TRAINED = [n for n in range(80) if n not in HELD]
"""Numbers of questions; both hold every kind of pair and every digit."""


def pairs(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """A pair a number: even ones differ in correctness alone, odd ones in style alone. (A source keeps a prompt once.)"""
    made = []
    for n in numbers:
        target, other = TWO[n % 2], TWO[1 - n % 2]
        word, end = WORDS[n // 2 % 2], ENDS[n // 2 % 2]
        chosen, rejected = [(one + end, word + two)[n % 2] for one, two in zip(WORDS, ENDS, strict=True)]
        margins = {target: 1.0, other: 0.0}
        made.append({"prompt": f"{n // 10} or {n % 10}", "chosen": chosen, "rejected": rejected, "margins": margins})
    return made


def grades(numbers: Sequence[int]) -> list[dict[str, Any]]:
    """An answer a number, graded in both dimensions; all four kinds in turn."""
    made = []
    for n in numbers:
        wrong, plain = n % 2, n // 2 % 2
        marks = {"correctness": 1.0 - wrong, "style": 1.0 - plain}
        made.append({"prompt": f"{n // 10} and {n % 10}", "completion": WORDS[wrong] + ENDS[plain], "grades": marks})
    return made


def reward_job(
    folder: Path, stage: Mapping[str, Any], files: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> StageJob:
    """A job for a reward stage with its base model made and its data prepared.

    Args:
        folder: takes everything.
        stage: its section.
        files: source -> records; by default the pairs of TRAINED ("pairs") and of HELD ("held_pairs").
    """
    files = files or {"pairs": pairs(TRAINED), "held_pairs": pairs(HELD)}
    folder.mkdir(parents=True, exist_ok=True)
    sources: dict[str, Any] = {}
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        sources[name] = {"kind": "jsonl", "path": str(folder / f"{name}.jsonl")}
    (folder / "sums.jsonl").write_text(json.dumps({"prompt": "1+1", "verifier": "exact", "answer": "2"}) + "\n")
    sources["sums"] = {"kind": "jsonl", "path": str(folder / "sums.jsonl"), "splits": {"test": 1}}
    config = RunConfig.model_validate(
        {
            "name": "test",
            "model": MODEL,
            "tokenizer": {"vocab_size": 280},
            "sources": sources,
            "eval": {"source": "sums/test", "num_prompts": 1},
            "stages": {"stage": stage},
        }
    )
    base, data = folder / "base", folder / "data"
    inputs = {"init": base, "data": data, "model": folder / "model"}
    job = StageJob("stage", config, folder / "stages" / "stage", inputs, folder / "metrics.jsonl")
    if not base.exists():
        run.make_base(StageJob("base", config, folder / "stages" / "base", {}, folder / "metrics.jsonl"), base)
        run.prepare(job, data)
    return job
