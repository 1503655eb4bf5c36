"""Rules: constraints on an answer that a program can check, evidence of the first level.

A record carries `constraints`, JSON text: [{"rule": "length_constraints:number_words", "num_words": 50, "relation": "at most"},
...]. Ids and parameters are those of IFEval (Zhou et al. 2023, arXiv 2311.07911), so that its data can be used; a record may
also carry IFEval's own fields, `instruction_id_list` and `kwargs`.

| category | module |
|---|---|
| keywords | keywords.py |
| length_constraints | lengths.py |
| detectable_format, format (ours) | formats.py |
| detectable_content, combination, startend, punctuation, repetition (ours) | contents.py |
| language, change_case | language.py |

MiniMax-01 (section 5.2) scores helpfulness by deterministic checkers of constraints, among others; which ones it does not say.
"""

from __future__ import annotations

import json
from typing import Any

from posttrain.config.errors import UserError
from posttrain.reward.rules import contents, formats, keywords, language, lengths  # noqa: F401  (they register their rules)
from posttrain.reward.rules.constraints import Constraint, constraints_from_ifeval, parse_constraints
from posttrain.reward.rules.rule import RULES, Outcome
from posttrain.reward.types import LevelScore, Sample

__all__ = ["RULES", "Outcome", "check", "constraints_from_ifeval", "gate_share", "parse_constraints"]

_FORMAT = ("detectable_format", "format")


def check(sample: Sample) -> LevelScore | None:
    """Check an answer against its record's constraints.

    An empty answer keeps none of them, as in IFEval: "no comma" would reward silence.

    Returns:
        A node "rules" whose score is the share of constraints kept, with one part a constraint under the rule's id (score 1 or 0;
        evidence `reason`, `params`, `gate`). Weights and contributions are 0: the composition sets them. None where the record
        has no constraints.

    Raises:
        UserError: constraints that are not well formed, or name an unknown rule or parameter.
    """
    constraints = _constraints(sample)
    if not constraints:
        return None
    parts = tuple(_checked(sample.answer, constraint) for constraint in constraints)
    kept = sum(part.score == 1.0 for part in parts)
    return LevelScore("rules", kept / len(parts), 0.0, 0.0, {"kept": kept, "of": len(parts)}, parts)


def gate_share(level: LevelScore) -> float | None:
    """Share of kept constraints among those that the format gate reads.

    These are the ones with `gate` true or, where the record marks none, those about format.

    Args:
        level: what `check` returned.

    Returns:
        In [0, 1]; None where no constraint belongs to the gate.
    """
    marked = [part for part in level.parts if part.evidence["gate"]]
    parts = marked or [part for part in level.parts if part.name.partition(":")[0] in _FORMAT and part.evidence["gate"] is None]
    return sum(part.score == 1.0 for part in parts) / len(parts) if parts else None


def _constraints(sample: Sample) -> tuple[Constraint, ...]:
    text = sample.reference.get("constraints")
    if text is not None:
        if not isinstance(text, str):
            raise UserError("'constraints' is no text", instead="should be JSON text, a list of rules")
        return parse_constraints(text)
    names, kwargs = sample.reference.get("instruction_id_list"), sample.reference.get("kwargs")
    if names is None:
        return ()
    return parse_constraints(json.dumps(constraints_from_ifeval(_listed(names), _listed(kwargs))))


def _listed(value: Any) -> list[Any]:
    """A list, or JSON text of one, as records hold them."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        value = None
    if not isinstance(value, list):
        raise UserError("'instruction_id_list' or 'kwargs' is no list", instead="should be two lists of equal length")
    return value


def _checked(answer: str, constraint: Constraint) -> LevelScore:
    if answer.strip():
        outcome = constraint.rule.function(answer, **constraint.params)
    else:
        outcome = Outcome(False, "the answer is empty")
    evidence = {"reason": outcome.reason, "params": dict(constraint.params), "gate": constraint.gate}
    return LevelScore(constraint.rule.id, float(outcome.kept), 0.0, 0.0, evidence)
