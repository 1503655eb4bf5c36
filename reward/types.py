"""The reward port: samples in, a breakdown of every level out, never a lone float."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


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


@dataclass(frozen=True)
class RewardBreakdown:
    """The composed reward of one sample and the levels it came from; `total` is the sum of their contributions."""

    total: float
    levels: tuple[LevelScore, ...]

    def level(self, name: str) -> LevelScore:
        """The first node of that name, at any depth; KeyError with the known names otherwise."""
        nodes = [node for level in self.levels for node in level.nodes()]
        for node in nodes:
            if node.name == name:
                return node
        raise KeyError(f"no level {name!r}; there are {[node.name for node in nodes]}")


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
