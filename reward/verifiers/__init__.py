"""Verifiers: programs that say whether an answer is right, evidence of the first level.

A record names its verifier (`verifier`) and carries what it needs (`answer`, `metadata`):

| verifier | module | reads |
|---|---|---|
| `exact` | exact.py | `answer`: the text |
| `choice` | choice.py | `answer`: a letter, or an option's text; `metadata`: `choices` |
| `math` | math.py | `answer`: a number, expression, set, interval, ... in LaTeX or plain |
| `reasoning_gym` | reasoning.py | `metadata`: the entry of the task |
| `code` | code.py | `metadata`: the tests |
"""

from __future__ import annotations

import importlib

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.reward.types import LevelScore, Sample, Verifier
from posttrain.reward.verifiers.choice import ChoiceVerifier
from posttrain.reward.verifiers.exact import ExactVerifier
from posttrain.reward.verifiers.math import MathVerifier
from posttrain.reward.verifiers.reasoning import ReasoningGymVerifier
from posttrain.reward.verifiers.verdict import RIGHT, is_right, required

__all__ = [
    "RIGHT",
    "VERIFIERS",
    "ChoiceVerifier",
    "ExactVerifier",
    "MathVerifier",
    "ReasoningGymVerifier",
    "is_right",
    "verify",
]


class _Deferred:
    """A verifier whose module is imported when it first verifies something."""

    def __init__(self, name: str, module: str, type_name: str) -> None:
        self.name, self._module, self._type_name = name, module, type_name
        self._verifier: Verifier | None = None

    def verify(self, sample: Sample) -> LevelScore:
        if self._verifier is None:
            self._verifier = getattr(importlib.import_module(self._module), self._type_name)()
        return self._verifier.verify(sample)


VERIFIERS: dict[str, Verifier] = {
    verifier.name: verifier
    for verifier in (
        ReasoningGymVerifier(),
        ExactVerifier(),
        ChoiceVerifier(),
        MathVerifier(),
        _Deferred("code", "posttrain.reward.verifiers.code", "CodeVerifier"),
    )
}
"""Every verifier by the name that records use."""


def verify(sample: Sample) -> LevelScore:
    """Score with the verifier that the record names; contribution 1 for a right answer, else 0.

    Raises:
        UserError: the record names no verifier, or an unknown one, or lacks what the verifier needs.
    """
    name = required(sample, "verifier")
    if name not in VERIFIERS:
        raise UserError(f"unknown verifier '{name}'", instead=suggest(name, VERIFIERS))
    return VERIFIERS[name].verify(sample)
