"""The reward port: samples in, a breakdown of every level out, never a lone float."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

SHOWN_CHARACTERS = 60
"""Longest piece of evidence in `RewardBreakdown.explain`; `to_json` has all of it."""


@dataclass(frozen=True)
class Sample:
    """An answer to be scored.

    Attributes:
        prompt: messages ({"role", "content"}) up to the answer.
        answer: text of the answer, special tokens removed.
        reference: what the record says about right answers, all text: "verifier" (name), "answer" (expected text), "metadata"
            and "constraints" (JSON), "domain".
    """

    prompt: Sequence[Mapping[str, str]]
    answer: str
    reference: Mapping[str, Any]


@dataclass(frozen=True)
class LevelScore:
    """A node of the hierarchy for one sample: a level, a dimension in it, or a piece of evidence.

    Attributes:
        name: "correctness", "verifier", "learned", ...
        score: the level's own scale; None is an honest "no verdict".
        weight: what it was multiplied by in `RewardBreakdown.total`.
        contribution: what it added to the total, its parts' contributions included.
        evidence: what the score rests on, JSON values only.
        parts: the nodes that it was made from.
    """

    name: str
    score: float | None
    weight: float
    contribution: float
    evidence: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[LevelScore, ...] = ()

    def nodes(self) -> Iterator[LevelScore]:
        """This node and all below it, a node before its parts."""
        yield self
        for part in self.parts:
            yield from part.nodes()

    def to_json(self) -> dict[str, Any]:
        """JSON values, parts included."""
        return {
            "name": self.name,
            "score": self.score,
            "weight": self.weight,
            "contribution": self.contribution,
            "evidence": dict(self.evidence),
            "parts": [part.to_json() for part in self.parts],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LevelScore:
        """The node that `to_json` wrote."""
        parts = tuple(cls.from_json(part) for part in value["parts"])
        return cls(value["name"], value["score"], value["weight"], value["contribution"], value["evidence"], parts)


@dataclass(frozen=True)
class RewardBreakdown:
    """The composed reward of one sample and the levels it came from.

    Attributes:
        total: the sum of the levels' contributions.
        levels: the top nodes.
        dropped: a judge gave no verdict, and the config leaves such answers out of training.
    """

    total: float
    levels: tuple[LevelScore, ...]
    dropped: bool = False

    def explain(self) -> str:
        """The tree as text, a node a line: what it added to the total, its name, score, weight and evidence."""
        lines = [f"total {self.total:.4f}" + (" (dropped: no verdict)" if self.dropped else "")]
        for level in self.levels:
            lines += _lines(level, depth=1)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """JSON values: total, dropped, levels."""
        return {"total": self.total, "dropped": self.dropped, "levels": [level.to_json() for level in self.levels]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RewardBreakdown:
        """The breakdown that `to_json` wrote."""
        return cls(value["total"], tuple(LevelScore.from_json(level) for level in value["levels"]), value["dropped"])

    def level(self, name: str) -> LevelScore:
        """The first node of that name, at any depth; KeyError with the known names otherwise."""
        nodes = [node for level in self.levels for node in level.nodes()]
        for node in nodes:
            if node.name == name:
                return node
        raise KeyError(f"no level {name!r}; there are {[node.name for node in nodes]}")


def _lines(node: LevelScore, depth: int) -> Iterator[str]:
    score = "no verdict" if node.score is None else f"{node.score:.4g}"
    weighed = f" x {node.weight:.3g}" if node.weight else ""
    evidence = "".join(f"  {name}={_shown(value)}" for name, value in node.evidence.items())
    yield f"{'  ' * depth}{node.contribution:+.4f}  {node.name}: {score}{weighed}{evidence}"
    for part in node.parts:
        yield from _lines(part, depth + 1)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


@runtime_checkable
class Verifier(Protocol):
    """Scores answers by a rule, without a model."""

    name: str

    def verify(self, sample: Sample) -> LevelScore:
        """Score in [0, 1], 1 for a right answer; weight 1."""
        ...


@runtime_checkable
class RewardModel(Protocol):
    """Scores samples."""

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        """One breakdown a sample, in order."""
        ...
