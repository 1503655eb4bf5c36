"""The heads of a learned reward model: which column of its scores speaks about what.

A model of `ensemble` members for each target has target * ensemble + member columns. Their names stand in the
configuration's `id2label` ("correctness/0", "correctness/1", ...; "correctness" where there is one member), so a saved
folder says itself what it scores, to stock transformers as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.dimensions import TARGETS
from posttrain.config.errors import UserError

UNNAMED_TARGET = "correctness"
"""What a saved scalar model without names (`LABEL_0`) scores."""

_LABEL = re.compile(r"([a-z]+)(?:/(\d+))?")


@dataclass(frozen=True)
class HeadScore:
    """A target's score of one answer: an unbounded logit.

    Attributes:
        mean: over the members of the ensemble.
        std: their sample standard deviation (divisor n - 1), the uncertainty; 0 for one member.
    """

    mean: float
    std: float


@dataclass(frozen=True)
class Heads:
    """Names and order of the columns.

    Attributes:
        targets: dimensions and attributes, in the order of their columns.
        ensemble: members of each.
    """

    targets: tuple[str, ...]
    ensemble: int = 1

    def __post_init__(self) -> None:
        """ValueError for no targets, a target twice, or no members."""
        if not self.targets or len(set(self.targets)) < len(self.targets) or self.ensemble < 1:
            raise ValueError(f"heads need distinct targets and at least one member, got {self.targets} x {self.ensemble}")

    def __len__(self) -> int:
        """Number of columns."""
        return len(self.targets) * self.ensemble

    def column(self, target: str, member: int = 0) -> int:
        """Column of one member of a target."""
        return self.targets.index(target) * self.ensemble + member

    def labels(self) -> list[str]:
        """Name of each column."""
        if self.ensemble == 1:
            return list(self.targets)
        return [f"{target}/{member}" for target in self.targets for member in range(self.ensemble)]

    @classmethod
    def from_labels(cls, labels: Sequence[str], where: str | None = None) -> Heads:
        """The heads that columns of these names are.

        Args:
            labels: name of each column, in order.
            where: place named in errors.

        Raises:
            UserError: names that are not those of `labels()`.
        """
        if len(labels) == 1 and labels[0] == "LABEL_0":
            return cls((UNNAMED_TARGET,))
        found = [_LABEL.fullmatch(label) for label in labels]
        targets = tuple(dict.fromkeys(match[1] for match in found if match))
        if targets and None not in found and set(targets) <= set(TARGETS) and len(labels) % len(targets) == 0:
            heads = cls(targets, len(labels) // len(targets))
            if heads.labels() == list(labels):
                return heads
        raise UserError(
            f"the heads {', '.join(map(str, labels)) or '(none)'} are not those of a reward model of this project",
            where=where,
            instead=f"`id2label` should name each of {', '.join(TARGETS)} once, or as TARGET/0, TARGET/1, ...",
        )

    @classmethod
    def from_config(cls, config: Any, where: str | None = None) -> Heads:
        """The heads of a model by its configuration's `id2label`; UserError as `from_labels`."""
        names: Mapping[int, str] = config.id2label
        return cls.from_labels([names[index] for index in sorted(names)], where)
