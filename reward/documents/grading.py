"""Grades of plain documents: depth of knowledge, practical helpfulness and category (MiniMax-01, section 4: quality of data).

Two graders share one protocol: a judging model that reads each document, and a learned reward model, which grades but does
not name categories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from posttrain.reward.judges.endpoint import Endpoint
from posttrain.reward.judges.prompts import TAGGED, block, read_choice, read_grade, read_reason, read_verdict, tag_for, unit
from posttrain.reward.judges.types import Costs, Question

TEMPLATE = "document/1"
"""Kind and version of the wording below; whoever changes it raises the version, so that old verdicts are not taken."""

UNKNOWN = "unknown"
"""Category of a document that nobody named one for."""

CATEGORIES = (
    "mathematics",
    "science and engineering",
    "programming",
    "medicine and health",
    "law, business and politics",
    "history and culture",
    "everyday life",
    "news",
    "fiction",
    "other",
)
"""Categories to choose from unless others are given."""

_INSTRUCTIONS = """\
You grade a document that a language model may learn from. {tagged}

depth: how much knowledge is in it.
1: none, such as menus, advertisements, word lists. 2: commonplace. 3: ordinary, as in a good news article.
4: thorough, as in a textbook. 5: expert, with reasons, derivations or sources.
helpfulness: how much a reader could do with it.
1: nothing. 2: little. 3: some information one can use. 4: answers a real question well. 5: complete and directly usable.
category: the one that fits best of: {categories}.
Length is no merit, nor is a grand style. A cut end is not the document's fault.

Think in a few words if you must. Then end with one line of JSON and nothing after it:
{{"id": "{tag}", "reason": "at most 20 words", "depth": 1 to 5, "helpfulness": 1 to 5, "category": "one of the list"}}"""


@dataclass(frozen=True)
class Document:
    """A plain text, where it is from, and the category that its record names (field `domain`), if any."""

    text: str
    source: str
    domain: str | None = None


@dataclass(frozen=True)
class DocumentGrade:
    """What a grader says about a document.

    Attributes:
        source: of the document.
        depth: of knowledge, in [0, 1]; None is "no verdict".
        helpfulness: practical, in [0, 1]; None is "no verdict".
        category: a name, or `UNKNOWN`.
        evidence: what it rests on, JSON values only; "category_from" is "judge", "record" or "nothing".
    """

    source: str
    depth: float | None
    helpfulness: float | None
    category: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quality(self) -> float | None:
        """Mean of depth and helpfulness, in [0, 1]; None where either is missing."""
        return None if self.depth is None or self.helpfulness is None else (self.depth + self.helpfulness) / 2


@runtime_checkable
class DocumentGrader(Protocol):
    """Grades documents."""

    def grade(self, documents: Sequence[Document]) -> list[DocumentGrade]:
        """One grade a document, in order."""
        ...


class DocumentJudge:
    """Lets a judging model read each document.

    Args:
        endpoint: the judging model.
        categories: the names to choose from; ValueError unless there are some, all different.
        max_characters: how much of a document is read, from its beginning; evidence says "cut" where there was more.
    """

    def __init__(self, endpoint: Endpoint, categories: Sequence[str] = CATEGORIES, max_characters: int = 16_000) -> None:
        if not categories or len(set(categories)) < len(categories) or max_characters < 1:
            raise ValueError("a judge of documents needs different categories and at least one character to read")
        self.endpoint, self.categories, self.max_characters = endpoint, tuple(categories), max_characters

    @property
    def costs(self) -> Costs:
        """What the judge has cost so far."""
        return self.endpoint.costs

    def grade(self, documents: Sequence[Document]) -> list[DocumentGrade]:
        """One grade a document, in order. Without a verdict both grades are None and the category is the record's."""
        verdicts = self.endpoint.ask([self.question(document.text) for document in documents])
        grades = []
        for document, verdict in zip(documents, verdicts, strict=True):
            evidence = verdict.evidence() | {"cut": len(document.text) > self.max_characters}
            if verdict.values is None:
                grades.append(_grade(document, None, None, evidence))
            else:
                depth, helpfulness = unit(verdict.values["depth"]), unit(verdict.values["helpfulness"])
                evidence["category_from"] = "judge"
                grades.append(DocumentGrade(document.source, depth, helpfulness, verdict.values["category"], evidence))
        return grades

    def question(self, text: str) -> Question:
        """The request about one text; its verdict has "depth" and "helpfulness" (1 to 5), "category" and "reason"."""
        read_text = text[: self.max_characters]
        tag = tag_for([read_text])
        system = _INSTRUCTIONS.format(tagged=TAGGED.format(tag=tag), tag=tag, categories="; ".join(self.categories))
        messages = ({"role": "system", "content": system}, {"role": "user", "content": block(tag, "DOCUMENT", read_text)})

        def read(reply: str) -> Mapping[str, Any]:
            found = read_verdict(reply, tag, ("reason", "depth", "helpfulness", "category"))
            return {
                "depth": read_grade(found["depth"]),
                "helpfulness": read_grade(found["helpfulness"]),
                "category": read_choice(found["category"], self.categories),
                "reason": read_reason(found["reason"]),
            }

        return Question(TEMPLATE, messages, read)


class LearnedDocumentGrader:
    """Grades with a learned reward model. Categories come from the records: the model has no head for them.

    Args:
        score: texts -> {"depth": ..., "helpfulness": ...}, each a number in [0, 1] for every text, in order.
        model: named in evidence, such as the reward model's folder or hash.
    """

    def __init__(self, score: Callable[[Sequence[str]], Mapping[str, Sequence[float]]], model: str) -> None:
        self.score, self.model = score, model

    def grade(self, documents: Sequence[Document]) -> list[DocumentGrade]:
        """One grade a document, in order.

        Raises:
            ValueError: the model gave no list, one of another length, or a number outside [0, 1].
        """
        scores = self.score([document.text for document in documents])
        depth, helpfulness = (_checked(scores, name, len(documents)) for name in ("depth", "helpfulness"))
        return [
            _grade(document, of_depth, of_helpfulness, {"model": self.model})
            for document, of_depth, of_helpfulness in zip(documents, depth, helpfulness, strict=True)
        ]


def _grade(document: Document, depth: float | None, helpfulness: float | None, evidence: Mapping[str, Any]) -> DocumentGrade:
    """A grade whose category is the record's, or unknown."""
    category_from = "record" if document.domain else "nothing"
    said = {**evidence, "category_from": category_from}
    return DocumentGrade(document.source, depth, helpfulness, document.domain or UNKNOWN, said)


def _checked(scores: Mapping[str, Sequence[float]], name: str, count: int) -> list[float]:
    values = [float(value) for value in scores.get(name, ())]
    if len(values) != count or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"a grader of documents must give a number in [0, 1] as {name} for each of {count} texts")
    return values
