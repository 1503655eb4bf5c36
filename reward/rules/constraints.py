"""The constraints of a record: read, checked against the rules' parameters, or translated from IFEval's schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.reward.rules.rule import RULES, Rule

_SHAPE = 'should be a list like [{"rule": "punctuation:no_comma"}]'


@dataclass(frozen=True)
class Constraint:
    """A rule with its parameters, as a record asks for it.

    Attributes:
        rule: what is checked.
        params: the parameters that the record gives.
        gate: whether the format gate reads it; None where the record does not say.
    """

    rule: Rule
    params: Mapping[str, Any]
    gate: bool | None


@lru_cache(maxsize=1024)  # a group of answers shares its record
def parse_constraints(text: str) -> tuple[Constraint, ...]:
    """Read a record's `constraints`: JSON text, a list of {"rule": id, parameters..., "gate": true or false}.

    Raises:
        UserError: no such list, an unknown rule, or parameters that the rule does not take.
    """
    try:
        entries = json.loads(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"'constraints' is not JSON ({error})", instead=_SHAPE) from error
    if not isinstance(entries, list):
        raise UserError("'constraints' is no list", instead=_SHAPE)
    return tuple(_constraint(entry) for entry in entries)


def constraints_from_ifeval(instruction_ids: Sequence[str], kwargs: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """Constraints from IFEval's `instruction_id_list` and `kwargs` (Zhou et al. 2023, arXiv 2311.07911), checked.

    Args:
        instruction_ids: one id an instruction.
        kwargs: its parameters, in the same order; empty cells (None) count as absent.

    Returns:
        What belongs into a record's `constraints`, as JSON.

    Raises:
        UserError: lists of different lengths, an unknown id, or parameters that it does not take.
    """
    if len(instruction_ids) != len(kwargs):
        raise UserError(
            f"'instruction_id_list' has {len(instruction_ids)} entries, 'kwargs' has {len(kwargs)}", instead="should be as many"
        )
    entries: list[dict[str, Any]] = []
    for name, given in zip(instruction_ids, kwargs, strict=True):
        entry = {"rule": name, **{key: value for key, value in (given or {}).items() if value is not None}}
        entries.append({"rule": name, **_constraint(entry).params})
    return entries


def _constraint(entry: Any) -> Constraint:
    if not isinstance(entry, dict) or not isinstance(entry.get("rule"), str):
        raise UserError("an entry of 'constraints' names no rule", instead=_SHAPE)
    name, gate = entry["rule"], entry.get("gate")
    if name not in RULES:
        raise UserError(f"unknown rule '{name}'", instead=suggest(name, RULES))
    if gate is not None and not isinstance(gate, bool):
        raise UserError(f"'gate' is {gate!r}", where=f"rule '{name}'", instead="should be true or false")
    params = {key: value for key, value in entry.items() if key not in ("rule", "gate")}
    return Constraint(RULES[name], RULES[name].checked(params), gate)
