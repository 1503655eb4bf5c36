"""The reward port: samples in, a breakdown of every level out, never a lone float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Sample:
    """An answer to be scored.

    Attributes:
        prompt: messages ({"role", "content"}) up to the answer.
        answer: text of the answer, special tokens removed.
        reference: verifier fields of the record: "verifier" (name), "answer" (expected text) and "metadata".
    """

    prompt: Sequence[Mapping[str, str]]
    answer: str
    reference: Mapping[str, Any]


@dataclass(frozen=True)
class LevelScore:
    """One level of the hierarchy for one sample.

    Attributes:
        name: "verifier", "learned", ...
        score: the level's own scale; None is an honest "no verdict".
        weight: what it was multiplied by in `RewardBreakdown.total`.
        contribution: what it added to the total.
        evidence: what the score rests on, JSON values only.
    """

    name: str
    score: float | None
    weight: float
    contribution: float
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardBreakdown:
    """The composed reward of one sample and the levels it came from; `total` is the sum of their contributions."""

    total: float
    levels: tuple[LevelScore, ...]

    def level(self, name: str) -> LevelScore:
        """The level of that name; KeyError with the known names otherwise."""
        for level in self.levels:
            if level.name == name:
                return level
        raise KeyError(f"no level {name!r}; there are {[level.name for level in self.levels]}")


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
