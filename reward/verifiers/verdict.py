"""What all verifiers share: the node of a verdict, when an answer is right, and the fields of a record."""

from __future__ import annotations

import json
from typing import Any

from posttrain.config.errors import UserError
from posttrain.reward.types import LevelScore, Sample

RIGHT = 0.99
"""Least score of a right answer; reasoning-gym gives partial credit below it."""


def verdict(score: float | None, evidence: dict[str, Any]) -> LevelScore:
    """A verifier's node; contribution 1 for a right answer, else 0.

    Partial credit does not count: reasoning-gym gives some for merely answering, which a policy would learn to collect.

    Args:
        score: in [0, 1]; None is "no verdict".
        evidence: JSON values only.
    """
    contribution = 1.0 if score is not None and score >= RIGHT else 0.0
    return LevelScore(name="verifier", score=score, weight=1.0, contribution=contribution, evidence=evidence)


def is_right(level: LevelScore) -> bool:
    """Whether a verifier's level says that the answer is right (score of at least 0.99)."""
    return level.score is not None and level.score >= RIGHT


def required(sample: Sample, name: str) -> str:
    """A text field of the record; UserError when it is missing or no text."""
    value = sample.reference.get(name)
    if not isinstance(value, str):
        raise UserError(f"a record to be verified has no '{name}'", instead="add the field to the data, or take another source")
    return value


def settings(sample: Sample) -> dict[str, Any]:
    """The record's `metadata`, a JSON object as text; empty where there is none. UserError when it is anything else."""
    text = sample.reference.get("metadata")
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"metadata is not JSON ({error})", instead="should be the text of a JSON object") from error
    if not isinstance(value, dict):
        raise UserError("metadata is no JSON object", instead='should be like {"choices": ["first", "second"]}')
    return value
