"""Schemas that grade every answer, as graded answers, and pairs made of the graded answers to one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.config.dimensions import TARGETS
from posttrain.config.errors import UserError
from posttrain.data.formats import Record, normalise, prompt_key
from posttrain.data.preferences.columns import Row, number_of, prompt_of, text_of, value_of

_HELPSTEER2 = {"correctness": "correctness", "helpfulness": "helpfulness", "coherence": "coherence", "complexity": "depth"}
_ULTRAFEEDBACK = {"truthfulness": "truthfulness", "helpfulness": "helpfulness"}


def helpsteer2(row: Row, where: str | None) -> list[Record]:
    """HelpSteer 2 (nvidia/HelpSteer2): one graded answer.

    Columns: `prompt`, `response` (text), `helpfulness`, `correctness`, `coherence`, `complexity`, `verbosity` (0 to 4). Grades
    are a fourth of them; complexity grades depth. Verbosity is checked and left out: more of it is neither good nor bad.
    """
    schema = "helpsteer2"
    number_of(row, "verbosity", schema, where, 0, 4)
    grades = {target: number_of(row, name, schema, where, 0, 4) / 4 for name, target in _HELPSTEER2.items()}
    return [_graded(prompt_of(row, "prompt", schema, where), text_of(row, "response", schema, where), grades, where)]


def ultrafeedback(row: Row, where: str | None) -> list[Record]:
    """UltraFeedback (openbmb/UltraFeedback): a graded answer for each completion of the row.

    Columns: `instruction` (text), `completions`: a list of objects with `response` (text) and `annotations`, an object by aspect
    (instruction_following, honesty, truthfulness, helpfulness) with `Rating`, "1" to "5" or "N/A". Truthfulness and helpfulness
    become grades, (rating - 1) / 4; the other two name no dimension of ours. Completions without either are left out.
    """
    prompt = prompt_of(row, "instruction", "ultrafeedback", where)
    completions = value_of(row, "completions", "ultrafeedback", where)
    if not isinstance(completions, Sequence) or not all(isinstance(one, Mapping) for one in completions):
        raise UserError("'completions' is no list of objects", where=where, instead="objects have 'response' and 'annotations'")
    records = []
    for number, one in enumerate(completions):
        place = f"{where}: completions[{number}]" if where else f"completions[{number}]"
        if grades := _ratings(value_of(one, "annotations", "ultrafeedback", place), place):
            records.append(_graded(prompt, text_of(one, "response", "ultrafeedback", place), grades, where))
    return records


def best_and_worst(graded: Sequence[Record]) -> list[Record]:
    """The pair of a prompt's best and worst answer by helpfulness, equals by their mean grade; none where all are equal.

    Margins are the leads in the grades that both have. A target in which the better answer trails has none.

    Args:
        graded: graded answers to one prompt.
    """
    ranked = sorted((record for record in graded if "helpfulness" in record["grades"]), key=_rank)
    if not ranked or _rank(ranked[0]) == _rank(ranked[-1]) or ranked[0]["completion"] == ranked[-1]["completion"]:
        return []
    worse, better = ranked[0], ranked[-1]
    leads = {target: better["grades"][target] - worse["grades"][target] for target in TARGETS if _both(target, better, worse)}
    margins = {target: lead for target, lead in leads.items() if lead >= 0}
    answers = {"chosen": better["completion"], "rejected": worse["completion"]}
    return [{"prompt": better["prompt"], **answers, "margins": margins}]


def by_prompt(records: Sequence[Record]) -> list[list[Record]]:
    """Records in groups of one prompt, groups in the order of their first record."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(prompt_key(record), []).append(record)
    return list(groups.values())


def _ratings(annotations: Any, where: str) -> dict[str, float]:
    if not isinstance(annotations, Mapping):
        raise UserError("'annotations' is no object", where=where, instead="it has 'truthfulness' and 'helpfulness'")
    grades = {}
    for aspect, target in _ULTRAFEEDBACK.items():
        entry = annotations.get(aspect)
        rating = entry.get("Rating") if isinstance(entry, Mapping) else None
        if rating is None:
            raise UserError(f"no 'Rating' of '{aspect}'", where=where, instead='format ultrafeedback has "1" to "5" or "N/A"')
        if rating != "N/A":
            if str(rating) not in ("1", "2", "3", "4", "5"):
                raise UserError(f"'{aspect}' is rated {rating!r}", where=where, instead='ratings are "1" to "5" or "N/A"')
            grades[target] = (int(rating) - 1) / 4
    return grades


def _graded(prompt: Any, answer: str, grades: Mapping[str, float], where: str | None) -> Record:
    return normalise({"prompt": prompt, "completion": answer, "grades": grades}, where)


def _rank(record: Record) -> tuple[float, float]:
    grades = record["grades"]
    return grades["helpfulness"], sum(grades.values()) / len(grades)


def _both(target: str, one: Record, other: Record) -> bool:
    return target in one["grades"] and target in other["grades"]
