"""What crosses between judges and the rest: the port itself, questions, verdicts, and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from posttrain.reward.types import LevelScore, Sample

SHOWN = 400
"""Characters of a judge's text, or of an error, that evidence keeps."""


@runtime_checkable
class Judge(Protocol):
    """A language model that gives evidence for a dimension."""

    name: str
    dimension: str

    def judge(self, samples: Sequence[Sample]) -> list[LevelScore]:
        """One node a sample, in order, named `judge:NAME`, of weight and contribution 0: who composes it sets both.

        The score lies in [0, 1], or is None for "no verdict"; evidence then says why under "no_verdict". Where the judge has
        nothing to go by (a record without a reference), evidence also says `"applicable": False`: nothing failed.
        """
        ...


class Unreadable(ValueError):
    """A judge's reply that is no verdict; the message says why."""


@dataclass(frozen=True)
class Question:
    """One request to a judge.

    Attributes:
        template: kind of judge and version of its wording; part of the cache's key.
        messages: the request ({"role", "content"}).
        read: values of the verdict in a reply's text; raises `Unreadable` for anything but a verdict.
    """

    template: str
    messages: tuple[Mapping[str, str], ...]
    read: Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """The answer to a question, or why there is none.

    Attributes:
        values: what `Question.read` found; None is "no verdict".
        model: name of the judging model.
        text: the end of the model's reply, at most `SHOWN` characters; where a verdict stands.
        problem: why there is no verdict; empty where there is one.
        cached: whether an earlier reply was read again.
    """

    values: Mapping[str, Any] | None
    model: str
    text: str = ""
    problem: str = ""
    cached: bool = False

    def evidence(self) -> dict[str, Any]:
        """The verdict as a node's evidence; JSON values only, bounded in length."""
        found: dict[str, Any] = {"model": self.model, "cached": self.cached}
        if self.values is None:
            found["no_verdict"] = self.problem
        else:
            found["reason"] = str(self.values.get("reason", ""))[:SHOWN]
        if self.text:
            found["text"] = self.text
        return found


@dataclass(frozen=True)
class Costs:
    """What a judge has cost since it was made. Costs of several judges add up with `+`.

    Attributes:
        questions: questions asked, answered from the cache or not.
        cache_hits: questions answered by an earlier reply, or by that of an equal question of the same call.
        no_verdicts: questions that got none.
        requests: HTTP requests sent, retries among them.
        retries: requests that repeated a failed one.
        prompt_tokens: as the endpoint counted them.
        completion_tokens: as the endpoint counted them.
        uncounted: replies without a count of tokens; the price leaves them out.
        price: by the prices in the configuration, in their currency.
    """

    questions: int = 0
    cache_hits: int = 0
    no_verdicts: int = 0
    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    price: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Costs(*(first + second for first, second in zip(mine, others, strict=True)))

    def to_json(self) -> dict[str, int | float]:
        """The counts by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Reply:
    """A model's text, and the tokens that it took where the endpoint counts them.

    Attributes:
        text: content of the first choice.
        tokens: (of the prompt, of the completion), or None.
        cut: whether the reply ended at `max_new_tokens`.
    """

    text: str
    tokens: tuple[int, int] | None = None
    cut: bool = False
