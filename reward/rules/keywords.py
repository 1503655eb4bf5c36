"""Rules about words and letters that should occur, or not (IFEval's category "keywords"). Case never matters."""

from __future__ import annotations

import re

from posttrain.reward.rules.rule import Outcome, Relation, compare, rule


@rule("keywords:existence")
def existence(answer: str, *, keywords: list[str]) -> Outcome:
    """Every keyword occurs, also within a word."""
    missing = [keyword for keyword in keywords if keyword.lower() not in answer.lower()]
    return Outcome(not missing, f"without {_listed(missing)}" if missing else "has every keyword")


@rule("keywords:frequency")
def frequency(answer: str, *, keyword: str, frequency: int, relation: Relation) -> Outcome:
    """A keyword occurs so many times, also within words."""
    found = answer.lower().count(keyword.strip().lower())
    return compare(found, relation, frequency, f"times '{keyword}'")


@rule("keywords:forbidden_words")
def forbidden_words(answer: str, *, forbidden_words: list[str]) -> Outcome:
    """None of the words occurs as a whole word."""
    found = [word for word in forbidden_words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.I)]
    return Outcome(not found, f"with {_listed(found)}" if found else "has no forbidden word")


@rule("keywords:letter_frequency")
def letter_frequency(answer: str, *, letter: str, let_frequency: int, let_relation: Relation) -> Outcome:
    """A letter, or any other character, occurs so many times."""
    return compare(answer.lower().count(letter.lower()), let_relation, let_frequency, f"times '{letter}'")


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
