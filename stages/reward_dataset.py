"""The items a reward model is trained on, in order: pairs and graded answers, as token ids with labels by target.

A stage of one head whose pairs name no dimensions needs no labels (`is_plain`); its rows are what TRL's trainer takes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from posttrain.config.errors import UserError
from posttrain.config.schema import RewardStage
from posttrain.data.encode import encode_document, encode_pair
from posttrain.data.mixture import sample_mixture
from posttrain.reward.curriculum import buckets as buckets_of
from posttrain.reward.curriculum import disagreement_of, pair_difficulty, plan_order
from posttrain.reward.learned import LearnedLevel
from posttrain.reward.types import Sample
from posttrain.stages import group
from posttrain.stages.checkpoints import MANIFEST, PREFIX
from posttrain.stages.files import read_json, read_records, write_text
from posttrain.stages.first_rank import from_first_rank
from posttrain.stages.job import StageJob
from posttrain.stages.sampling import as_sample

Record = Mapping[str, Any]
Row = dict[str, Any]

CURRICULUM = "curriculum.json"
"""File in the stage's folder with the order that its curriculum was planned in."""


def reward_dataset(
    job: StageJob, tokenizer: PreTrainedTokenizerBase, ensemble: LearnedLevel | None = None
) -> tuple[Dataset, int]:
    """Items of every step, in order, and their number a step: as many as fill the step's packed sequences on average.

    Args:
        job: its `inputs["data"]` holds the records that `prepare_reward` wrote.
        tokenizer: of the model to be trained.
        ensemble: an earlier reward model, whose disagreement about a pair the curriculum counts as difficulty.

    Columns: `chosen_ids`, `rejected_ids` (token ids; of a graded answer the first, and none). Unless the stage is plain also
    those of `_labels`. With a curriculum also `bucket` (of a pair; None for a graded answer).

    Raises:
        UserError: the items of a step do not divide over the workers, or a source with weight has no items.
        OSError: the curriculum's order cannot be read or written.
    """
    stage = job.stage
    assert isinstance(stage, RewardStage)
    records = read_records(job.inputs["data"] / "records.jsonl")
    plain = is_plain(stage, records)
    rows: list[Row] = []
    by_source: dict[str, list[int]] = {ref: [] for ref in stage.data}
    for number, record in enumerate(records):
        rows.append(_token_ids(tokenizer, record) | ({} if plain else _labels(record, stage, job.config.seed)))
        by_source[record["source"]].append(number)
    tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    per_step = _items_per_step(job, len(rows), tokens)
    counts = {ref: len(members) for ref, members in by_source.items()}
    drawn = sample_mixture(counts, stage.data, stage.steps * per_step, job.config.seed)
    order = [by_source[ref][index] for ref, index in drawn]
    if stage.curriculum is not None:
        order, buckets = from_first_rank(lambda: _planned(order, records, job, ensemble))
        for row, bucket in zip(rows, buckets, strict=True):
            row["bucket"] = bucket
    return Dataset.from_list([rows[number] for number in order]), per_step


def is_plain(stage: RewardStage, records: Sequence[Record]) -> bool:
    """Whether one head learns from plain preferences alone: TRL's own loss is then the one wanted."""
    alone = len(stage.dimensions) == 1 and stage.ensemble == 1 and not stage.label_noise
    return alone and not any("margins" in record or is_graded(record) for record in records)


def is_graded(record: Record) -> bool:
    """Whether a record is a graded answer, not a pair or a prompt."""
    return "grades" in record and "completion" in record


def pair_margins(record: Record, targets: Sequence[str]) -> dict[str, float | None]:
    """By how much the better answer of a pair leads in each of the targets that it names; None where not known how much.

    A pair without `margins` counts for the first target.
    """
    if "margins" not in record:
        return {targets[0]: None}
    return {target: record["margins"][target] for target in targets if target in record["margins"]}


def differing(record: Record, targets: Sequence[str]) -> list[str]:
    """The targets in which a pair has a better answer."""
    return [target for target, margin in pair_margins(record, targets).items() if margin != 0]


def answer_sample(record: Record, side: str) -> Sample:
    """One of a pair's answers ("chosen", "rejected"), or a graded one ("completion"), ready to be scored."""
    messages = record[side]
    conversation = [*record.get("prompt", ()), *messages[:-1]]
    return as_sample({**record, "prompt": conversation}, messages[-1]["content"])


def bootstrap_weight(seed: int, record: Record, member: int) -> int:
    """How often an item counts for a member of the ensemble: Poisson with mean 1, the limit of drawing with replacement.

    A function of the seed, the item's text and the member, so neither order nor number of workers changes it.
    """
    content = [record.get(name) for name in ("prompt", "chosen", "rejected", "completion")]
    text = json.dumps([seed, member, content], ensure_ascii=False)
    uniform = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    count, probability = 0, math.exp(-1)
    while uniform >= probability:
        uniform -= probability
        count += 1
        probability /= count
    return count


def _token_ids(tokenizer: PreTrainedTokenizerBase, record: Record) -> Row:
    if is_graded(record):
        return {"chosen_ids": encode_document(tokenizer, record).input_ids, "rejected_ids": []}
    chosen, rejected = encode_pair(tokenizer, record)
    return {"chosen_ids": chosen.input_ids, "rejected_ids": rejected.input_ids}


def _labels(record: Record, stage: RewardStage, seed: int) -> Row:
    """Labels by target: bool `differs` and `equal` and float `margins` of a pair (0 where not known), bool `graded` and float
    `grades` of an answer; and `weights` by member, 1 where there is one member."""
    targets = stage.dimensions
    margins = {} if is_graded(record) else pair_margins(record, targets)
    grades = record["grades"] if is_graded(record) else {}
    members = range(stage.ensemble)
    return {
        "differs": [target in margins and margins[target] != 0 for target in targets],
        "equal": [margins.get(target) == 0 for target in targets],
        "margins": [margins.get(target) or 0.0 for target in targets],
        "graded": [target in grades for target in targets],
        "grades": [grades.get(target, 0.0) for target in targets],
        "weights": [float(bootstrap_weight(seed, record, member)) for member in members] if stage.ensemble > 1 else [1.0],
    }


def _items_per_step(job: StageJob, items: int, tokens: int) -> int:
    stage, world = job.stage, group.world_size()
    filling = stage.batch_size * stage.pack_length * items / tokens
    per_step = max(int(filling) // stage.batch_size, 1) * stage.batch_size
    if per_step % world:
        raise UserError(f"{per_step} pairs a step do not divide over {world} workers", where=f"stages.{job.name}.batch_size")
    return per_step


def _planned(
    order: Sequence[int], records: Sequence[Record], job: StageJob, ensemble: LearnedLevel | None
) -> tuple[list[int], list[str | None]]:
    """What `_by_curriculum` gives; a stage that goes on from a checkpoint keeps the order that it began with.

    Scores of an ensemble may differ in their last bits between devices and versions, and an order hangs on the last bit.
    """
    path = job.folder / CURRICULUM
    if path.exists() and any(job.checkpoints.glob(f"{PREFIX}*/{MANIFEST}")):
        stored = read_json(path)
        if len(stored["order"]) == len(order) and len(stored["buckets"]) == len(records):
            return stored["order"], stored["buckets"]
        raise UserError(
            "the stage began with other data or steps", where=str(path), instead="remove the stage's checkpoints to begin anew"
        )
    planned, buckets = _by_curriculum(order, records, job, ensemble)
    write_text(path, json.dumps({"order": planned, "buckets": buckets}) + "\n")
    return planned, buckets


def _by_curriculum(
    order: Sequence[int], records: Sequence[Record], job: StageJob, ensemble: LearnedLevel | None
) -> tuple[list[int], list[str | None]]:
    """The order with the curriculum's pairs in the places of pairs, and each record's bucket.

    Graded answers keep their places, and so their source's share; sources of pairs have what the curriculum gives them, but
    for those of weight 0, whose pairs have no bucket either.
    """
    stage = job.stage
    assert isinstance(stage, RewardStage) and stage.curriculum is not None
    numbers = [n for n, record in enumerate(records) if not is_graded(record) and stage.data[record["source"]] > 0]
    places = [place for place, number in enumerate(order) if not is_graded(records[number])]
    if not places:
        raise UserError(
            "the stage's data hold graded answers alone, so there are no pairs to put in order",
            where=f"stages.{job.name}.curriculum",
            instead="leave it out, or add pairs",
        )
    pairs = [records[number] for number in numbers]
    if ensemble is not None:
        disagreements = disagreement_of(member_leads(ensemble, pairs))
        pairs = [{**pair, "disagreement": value} for pair, value in zip(pairs, disagreements, strict=True)]
    difficulties = pair_difficulty(pairs, stage.curriculum.difficulty)
    buckets = buckets_of(pairs, difficulties)
    # A place is a step here: progress is counted in pairs, which graded answers between them do not change.
    planned = plan_order(difficulties, buckets, stage.curriculum, len(places), 1, job.config.seed)
    result = list(order)
    for place, index in zip(places, planned, strict=True):
        result[place] = numbers[index]
    by_record: list[str | None] = [None] * len(records)
    for number, bucket in zip(numbers, buckets, strict=True):
        by_record[number] = bucket
    return result, by_record


def member_leads(ensemble: LearnedLevel, pairs: Sequence[Record]) -> list[list[float]]:
    """By how much each member scores the better answer of a pair higher: the mean over the targets in which it differs.

    Pairs that differ in no target of the ensemble are judged by its first.
    """
    targets = ensemble.heads.targets
    better = ensemble.member_scores([answer_sample(pair, "chosen") for pair in pairs])
    worse = ensemble.member_scores([answer_sample(pair, "rejected") for pair in pairs])
    leads = []
    for pair, high, low in zip(pairs, better, worse, strict=True):
        columns = [targets.index(target) for target in differing(pair, targets)] or [0]
        members = range(ensemble.heads.ensemble)
        leads.append([math.fsum(high[c][m] - low[c][m] for c in columns) / len(columns) for m in members])
    return leads
