"""From rows of a published schema to groups of records, one group a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import Target
from posttrain.data.formats import Record
from posttrain.data.preferences import benchmarks, graded, pairs
from posttrain.data.preferences.columns import Row

PAIRED: dict[str, Callable[[Row, str | None, Target | None], list[Record]]] = {
    "helpsteer3": pairs.helpsteer3,
    "skywork": pairs.skywork,
    "hh": pairs.hh,
    "rewardbench2": benchmarks.rewardbench2,
    "rm_bench": benchmarks.rm_bench,
}
"""Formats that say which answer is better."""

GRADED: dict[str, Callable[[Row, str | None], list[Record]]] = {
    "helpsteer2": graded.helpsteer2,
    "ultrafeedback": graded.ultrafeedback,
}
"""Formats that grade answers (UltraFeedback is published binarised, too, and then says only which is better)."""


def adapt(
    rows: Iterable[tuple[str, Row]],
    schema: str,
    emit: Literal["pairs", "grades"] = "pairs",
    dimension: Target | None = None,
) -> list[list[Record]]:
    """Normalised records in groups of one prompt, in the order of the rows.

    Args:
        rows: place named in errors, and the row.
        schema: a name in `PAIRED` or `GRADED`.
        emit: pairs, or the graded answers themselves; of `PAIRED` formats there are pairs alone.
        dimension: what a pair of a `PAIRED` format is about; None takes the format's own.

    Raises:
        UserError: a column that is missing or holds what the format does not, or grades asked of rows that have none.
    """
    found: list[Record] = []
    of_grades: list[Record] = []
    for where, row in rows:
        if schema in GRADED and not (schema == "ultrafeedback" and "chosen" in row):
            of_grades += GRADED[schema](row, where)
        elif emit == "grades":
            raise UserError(f"format {schema} has no grades here", where=where, instead="write emit: pairs")
        else:
            read = PAIRED.get(schema, pairs.ultrafeedback_binarized)
            found += read(row, where, dimension)
    groups = graded.by_prompt(found + (of_grades if emit == "grades" else []))
    if emit == "pairs":
        groups += [made for group in graded.by_prompt(of_grades) if (made := graded.best_and_worst(group))]
    return groups
