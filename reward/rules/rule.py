"""A rule: a named check of an answer with typed parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_type_hints

from posttrain.config.errors import UserError
from posttrain.config.names import suggest

Relation = Literal["at least", "at most", "less than", "more than", "exactly"]
"""IFEval uses "at least" and "less than"; the others are ours."""

_COMPARES: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda found, wanted: found >= wanted,
    "at most": lambda found, wanted: found <= wanted,
    "less than": lambda found, wanted: found < wanted,
    "more than": lambda found, wanted: found > wanted,
    "exactly": lambda found, wanted: found == wanted,
}
_KINDS: dict[Any, str] = {
    str: "text",
    int: "a whole number of at least 0",
    float: "a number from 0 to 1",
    bool: "true or false",
    list[str]: "a list of texts",
    Relation: f"one of {', '.join(_COMPARES)}",
}


class Outcome(NamedTuple):
    """Whether an answer keeps a rule, and what was seen in it."""

    kept: bool
    reason: str


@dataclass(frozen=True)
class Rule:
    """A rule under its id.

    Attributes:
        id: "category:name".
        function: called with the answer, and the parameters as keywords; returns an `Outcome`. Pure.
        kinds: type of every parameter.
        needed: parameters without a default.
    """

    id: str
    function: Callable[..., Outcome]
    kinds: Mapping[str, Any]
    needed: frozenset[str]

    def checked(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, numbers as the rule takes them; UserError where one is unknown, missing or of the wrong kind."""
        where = f"rule '{self.id}'"
        for name in params:
            if name not in self.kinds:
                raise UserError(f"has no parameter '{name}'", where=where, instead=suggest(name, self.kinds))
        for name in self.kinds:
            if name in self.needed and name not in params:
                raise UserError(f"needs the parameter '{name}'", where=where, instead=f"it is {_KINDS[self.kinds[name]]}")
        return {name: self._value(name, value) for name, value in params.items()}

    def _value(self, name: str, value: Any) -> Any:
        kind = self.kinds[name]
        if isinstance(value, float) and value.is_integer() and kind is int:
            value = int(value)  # tables with empty cells hold whole numbers as floats
        good = {
            str: lambda: isinstance(value, str) and value != "",
            int: lambda: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
            float: lambda: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1,
            bool: lambda: isinstance(value, bool),
            list[str]: lambda: isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value),
            Relation: lambda: isinstance(value, str) and value in _COMPARES,
        }[kind]()
        if not good:
            raise UserError(f"'{name}' is {value!r}"[:120], where=f"rule '{self.id}'", instead=f"should be {_KINDS[kind]}")
        return value


RULES: dict[str, Rule] = {}
"""Every rule by its id; filled by the modules that `posttrain.reward.rules` imports."""


def rule(identifier: str) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Register a function as a rule: its keyword parameters, with their types and defaults, are the rule's."""

    def register(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        hints = get_type_hints(function)
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        kinds = {p.name: hints[p.name] for p in parameters}
        needed = frozenset(p.name for p in parameters if p.default is p.empty)
        RULES[identifier] = Rule(identifier, function, kinds, needed)
        return function

    return register


def compare(found: int, relation: Relation, wanted: int, what: str) -> Outcome:
    """Compare a count with the wanted one; `what` names the things that were counted."""
    return Outcome(_COMPARES[relation](found, wanted), f"{found} {what}, should be {relation} {wanted}")
