"""Evaluation of a reward model on held-out pairs and graded answers: accuracy by bucket and target, leakage, calibration, bias.

Rows (`PairRow`, `GradeRow`) are made by `score_pairs` and `score_grades`; all numbers are functions of rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.dimensions import ATTRIBUTES
from posttrain.config.reward_schema import DifficultySection
from posttrain.config.schema import RewardStage
from posttrain.data.encode import encode_answer
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_reward_model
from posttrain.reward.curriculum import buckets as buckets_of
from posttrain.reward.curriculum import pair_difficulty
from posttrain.reward.guards.agreement import agreement
from posttrain.reward.guards.calibration import calibrate
from posttrain.reward.guards.length_bias import length_bias
from posttrain.reward.heads import HeadScore
from posttrain.reward.learned import LearnedLevel
from posttrain.reward.verifiers import is_right, verify
from posttrain.stages.devices import placed
from posttrain.stages.files import read_records, write_records
from posttrain.stages.reward_dataset import answer_sample, differing, pair_margins

Record = Mapping[str, Any]
Scores = Mapping[str, HeadScore]


@dataclass(frozen=True)
class PairRow:
    """A held-out pair with its scores.

    Attributes:
        record: the normalised pair.
        difficulty: among the held-out pairs, in [0, 1].
        bucket: by difficulty.
        chosen, rejected: scores of the better and the worse answer by target.
        lengths: tokens of both answers, the stop token included.
    """

    record: Record
    difficulty: float
    bucket: str
    chosen: Scores
    rejected: Scores
    lengths: tuple[int, int]

    def lead(self, target: str) -> float:
        """By how much the better answer scores higher in a target."""
        return self.chosen[target].mean - self.rejected[target].mean

    def margins(self) -> dict[str, float | None]:
        """What the pair says about the model's targets, see `pair_margins`."""
        return pair_margins(self.record, list(self.chosen))

    def differing(self) -> list[str]:
        """Targets of the model in which the pair has a better answer."""
        return differing(self.record, list(self.chosen))

    def preference(self) -> float:
        """Mean lead over the targets in which the pair differs: what the pair as a whole is judged by."""
        targets = self.differing()
        return math.fsum(self.lead(target) for target in targets) / len(targets)

    def to_json(self) -> dict[str, Any]:
        """A line of pairs.jsonl."""
        record = self.record
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        return {
            "prompt": "\n\n".join(message["content"] for message in record.get("prompt", ())),
            "chosen": record["chosen"][-1]["content"],
            "rejected": record["rejected"][-1]["content"],
            "source": record.get("source"),
            "kind": record.get("pair_kind"),
            "bucket": self.bucket,
            "difficulty": self.difficulty,
            "margins": self.margins(),
            "scores": {
                target: {side: [scores[target].mean, scores[target].std] for side, scores in sides.items()}
                for target in self.chosen
            },
            "lengths": {"chosen": self.lengths[0], "rejected": self.lengths[1]},
        }


@dataclass(frozen=True)
class GradeRow:
    """A held-out graded answer: its grades in [0, 1] and its scores, by target."""

    grades: Mapping[str, float]
    scores: Scores


def evaluate_reward(stage: RewardStage, model_folder: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Score the held-out data of `prepare_reward` with a saved model; write pairs.jsonl into `folder`.

    Args:
        stage: the stage's section; its curriculum says what makes a pair difficult.
        model_folder: the model.
        data: folder with heldout.jsonl and heldout_grades.jsonl.
        folder: takes pairs.jsonl.

    Returns:
        the report of `summary`.
    """
    learned = LearnedLevel(placed(load_reward_model(model_folder)), load_tokenizer(model_folder))
    records = read_records(data / "heldout.jsonl")
    rows = score_pairs(learned, records, rank_pairs(records, difficulty_section(stage)))
    write_records(folder / "pairs.jsonl", [row.to_json() for row in rows])
    return summary(rows, score_grades(learned, read_records(data / "heldout_grades.jsonl")))


def rank_pairs(records: Sequence[Record], section: DifficultySection) -> list[tuple[float, str]]:
    """Difficulty and bucket of each pair among `records`, in order."""
    difficulties = pair_difficulty(records, section)
    return list(zip(difficulties, buckets_of(records, difficulties), strict=True))


def score_pairs(learned: LearnedLevel, records: Sequence[Record], ranks: Sequence[tuple[float, str]]) -> list[PairRow]:
    """A row for each pair, in order; `ranks` are those of `rank_pairs`."""
    chosen = [answer_sample(record, "chosen") for record in records]
    rejected = [answer_sample(record, "rejected") for record in records]
    parts = [
        records,
        [difficulty for difficulty, _ in ranks],
        [bucket for _, bucket in ranks],
        learned.dimension_scores(chosen),
        learned.dimension_scores(rejected),
        [
            (len(encode_answer(learned.tokenizer, better.answer)), len(encode_answer(learned.tokenizer, worse.answer)))
            for better, worse in zip(chosen, rejected, strict=True)
        ],
    ]
    return [PairRow(*values) for values in zip(*parts, strict=True)]


def score_grades(learned: LearnedLevel, records: Sequence[Record]) -> list[GradeRow]:
    """A row for each graded answer, in order."""
    scores = learned.dimension_scores([answer_sample(record, "completion") for record in records])
    return [GradeRow(record["grades"], score) for record, score in zip(records, scores, strict=True)]


def difficulty_section(stage: RewardStage) -> DifficultySection:
    """What makes a pair difficult, by the stage's curriculum or by default."""
    return stage.curriculum.difficulty if stage.curriculum is not None else DifficultySection()


def accuracy_by_bucket(learned: LearnedLevel, records: Sequence[Record], ranks: Sequence[tuple[float, str]]) -> dict[str, float]:
    """Share of the pairs of each bucket whose better answer is preferred; ties in all targets are left out."""
    rows = [row for row in score_pairs(learned, records, ranks) if row.differing()]
    return {bucket: part["accuracy"] for bucket, part in _by_bucket(rows).items()}


def summary(pairs: Sequence[PairRow], grades: Sequence[GradeRow]) -> dict[str, Any]:
    """The section "reward" of eval.json; what no held-out data speak about is None or left out.

    Fields: `targets`; `pair_accuracy` ("all", "by_bucket", "by_target"); `ties` (mean absolute lead by target where answers are
    equal); `leakage`, see `leakage`; `agreement`, see `level_agreement`; `calibration` by target, of leads where pairs differ;
    `length_bias`; `grades`, Pearson's correlation of sigmoid(score) with the grade by target.
    """
    unequal = [row for row in pairs if row.differing()]
    targets = list(pairs[0].chosen)
    leads = {target: [row.lead(target) for row in pairs if target in row.differing()] for target in targets}
    equal = {target: [abs(row.lead(target)) for row in pairs if row.margins().get(target) == 0] for target in targets}
    biased = length_bias([row.preference() for row in unequal], [row.lengths[0] - row.lengths[1] for row in unequal])
    return {
        "targets": targets,
        "pair_accuracy": {
            "all": _preferred(row.preference() for row in unequal),
            "by_bucket": _by_bucket(unequal),
            "by_target": {target: _accuracy(values) for target, values in leads.items() if values},
        },
        "ties": {
            target: {"mean_lead": math.fsum(values) / len(values), "count": len(values)}
            for target, values in equal.items()
            if values
        },
        "leakage": leakage(pairs),
        "agreement": level_agreement(pairs),
        "calibration": {target: calibrate(values).to_json() for target, values in leads.items() if len(values) > 1},
        "length_bias": biased.to_json(),
        "grades": {target: _correlation(grades, target) for target in targets if any(target in row.grades for row in grades)},
    }


def leakage(rows: Sequence[PairRow]) -> dict[str, dict[str, dict[str, float]]]:
    """For pairs that differ in dimension d alone, how often the head of t prefers the better answer.

    Near 1 where t is d, near 0.5 where the head of t sees nothing of d. Pairs that do not name every head are left out: they may
    differ in what they do not name. Helpfulness is the sum of its attributes, so a pair that differs in one attribute and in
    helpfulness differs in that attribute alone, and one that differs in helpfulness and any attributes differs in helpfulness
    alone.

    Returns:
        d -> t -> {"share", "mean_lead", "count"}; empty cells are left out.
    """
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if not set(row.chosen) <= set(row.record.get("margins", ())):
            continue
        apart = {target for target, margin in row.record["margins"].items() if margin != 0}
        for dimension in row.chosen:
            if _alone(dimension, apart):
                for target in row.chosen:
                    cells[dimension][target].append(row.lead(target))
    return {
        dimension: {
            target: {"share": _preferred(leads), "mean_lead": math.fsum(leads) / len(leads), "count": len(leads)}
            for target, leads in by_target.items()
        }
        for dimension, by_target in cells.items()
    }


def level_agreement(rows: Sequence[PairRow]) -> dict[str, float | None] | None:
    """How far the head of correctness orders answers as the verifier does, on both answers of the pairs that have one.

    Returns:
        "auc" over all answers and "auc_within" prompts, see `posttrain.reward.guards.agreement`, and "count" of answers; None
        without such pairs or without the head.
    """
    verified = [row for row in rows if "verifier" in row.record and "correctness" in row.chosen]
    if not verified:
        return None
    right, scores, prompts = [], [], []
    for row in verified:
        for side, of_side in (("chosen", row.chosen), ("rejected", row.rejected)):
            sample = answer_sample(row.record, side)
            right.append(float(is_right(verify(sample))))
            scores.append(of_side["correctness"].mean)
            prompts.append(tuple((message["role"], message["content"]) for message in sample.prompt))
    found = agreement(right, scores, prompts)
    return {"auc": found.auc, "auc_within": found.auc_within, "count": len(right)}


def _alone(dimension: str, apart: set[str]) -> bool:
    if dimension == "helpfulness":
        return dimension in apart and apart <= {dimension, *ATTRIBUTES}
    return dimension in apart and apart <= ({dimension, "helpfulness"} if dimension in ATTRIBUTES else {dimension})


def _preferred(leads: Iterable[float]) -> float:
    """Share of leads above 0; those of 0 count half."""
    values = list(leads)
    return sum((lead > 0) + 0.5 * (lead == 0) for lead in values) / len(values)


def _accuracy(leads: Sequence[float]) -> dict[str, float]:
    return {"accuracy": _preferred(leads), "count": len(leads)}


def _by_bucket(rows: Sequence[PairRow]) -> dict[str, dict[str, float]]:
    leads: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        leads[row.bucket].append(row.preference())
    return {bucket: _accuracy(leads[bucket]) for bucket in sorted(leads)}


def _correlation(rows: Sequence[GradeRow], target: str) -> dict[str, float | None]:
    named = [row for row in rows if target in row.grades]
    grades = [row.grades[target] for row in named]
    marks = [0.5 * (1 + math.tanh(row.scores[target].mean / 2)) for row in named]  # sigmoid, without overflow
    return {"pearson": _pearson(marks, grades), "count": len(named)}


def _pearson(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation; None where a side does not vary."""
    first, second = _deviations(one), _deviations(other)
    spread = math.sqrt(math.fsum(a * a for a in first)) * math.sqrt(math.fsum(b * b for b in second))
    return math.fsum(a * b for a, b in zip(first, second, strict=True)) / spread if spread > 0 else None


def _deviations(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]
