"""Grades of plain documents, and weights of their sources from them; the grading itself is in `posttrain.reward.documents`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import EndpointSection
from posttrain.pipeline.files import write_json_lines
from posttrain.pipeline.reward_tables import Table, number, percent
from posttrain.pipeline.scoring import open_learned
from posttrain.reward.composition import sigmoid
from posttrain.reward.documents import (
    Document,
    DocumentGrade,
    DocumentGrader,
    DocumentJudge,
    GroupWeight,
    LearnedDocumentGrader,
    thinning,
)
from posttrain.reward.types import Sample

NEEDED = ("depth", "helpfulness")
"""Heads that a reward model must have to grade documents."""

REQUEST = "Write a text that one can learn from."
"""Stands for the prompt that a document has not, since the reward model was trained on answers to prompts."""


def judge_grader(url: str, model: str, key_variable: str | None = None) -> DocumentJudge:
    """A grader that lets a model behind an OpenAI-compatible endpoint read each document; UserError for an unusable address."""
    from posttrain.reward.judges import Endpoint

    return DocumentJudge(Endpoint("documents", EndpointSection(url=url, model=model, api_key_variable=key_variable)))


def learned_grader(folder: Path) -> DocumentGrader:
    """A grader that reads depth and helpfulness off a reward model's heads, each squashed into (0, 1).

    Raises:
        UserError: the folder is damaged, or the model has no such heads.
    """
    learned = open_learned(folder)
    lacking = [name for name in NEEDED if name not in learned.heads.targets]
    if lacking:
        raise UserError(
            f"the reward model has no head for {' and '.join(lacking)}",
            where=str(folder),
            instead="name them in `dimensions` of its stage, or grade with --judge",
        )
    return LearnedDocumentGrader(_squashed(learned.dimension_scores), str(folder))


def _squashed(
    dimension_scores: Callable[[Sequence[Sample]], Sequence[Mapping[str, Any]]],
) -> Callable[[Sequence[str]], dict[str, list[float]]]:
    def score(texts: Sequence[str]) -> dict[str, list[float]]:
        found = dimension_scores([Sample([{"role": "user", "content": REQUEST}], text, {}) for text in texts])
        return {name: [sigmoid(scores[name].mean) for scores in found] for name in NEEDED}

    return score


def write_grades(path: Path, documents: Sequence[Document], grades: Sequence[DocumentGrade], floor: float) -> None:
    """One JSON line a document, in order: its grades, and `keep`, the probability of keeping it when documents are thinned."""
    lines = [
        {"text": document.text, **asdict(grade), "quality": grade.quality, "keep": keep}
        for document, grade, keep in zip(documents, grades, thinning(grades, floor), strict=True)
    ]
    write_json_lines(path, lines)


def grades_table(grades: Sequence[DocumentGrade]) -> Table:
    """Documents and mean grades by category."""
    members: dict[str, list[DocumentGrade]] = {}
    for grade in grades:
        members.setdefault(grade.category, []).append(grade)
    rows = tuple(
        (category, str(len(found)), number(_mean([g.depth for g in found])), number(_mean([g.helpfulness for g in found])))
        for category, found in sorted(members.items(), key=lambda item: -len(item[1]))
    )
    ungraded = sum(grade.quality is None for grade in grades)
    note = f"{ungraded} of {len(grades)} documents have no verdict." if ungraded else ""
    return Table("Grades by category (0 worst, 1 best)", ("category", "documents", "depth", "helpfulness"), rows, note)


def weights_table(weights: Sequence[GroupWeight]) -> Table:
    """Weights of sources that follow the grades."""
    rows = tuple(
        (group.source, str(group.graded), str(group.ungraded), number(group.quality), percent(group.weight)) for group in weights
    )
    return Table("Weights of sources", ("source", "graded", "no verdict", "quality", "weight"), rows)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
