"""Tables about reward models: for a terminal, a notebook and the page of a run alike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from posttrain.pipeline.intervals import wilson
from posttrain.pipeline.reward_data import RewardStageData, ScoredPair, by_bucket, by_target

LONGEST_CELL = 160
"""Characters of a text that a cell shows."""

PAIR_COLUMNS = ("prompt", "better", "worse", "lead (logit)", "differs in", "bucket")

LENGTH_BIAS_WORDS = {
    "correlation": "correlation of score lead and length lead",
    "slope": "logits a token of length",
    "share_longer_preferred": "share of pairs in which the longer answer is preferred",
    "accuracy_longer_better": "accuracy where the better answer is longer",
    "accuracy_shorter_better": "accuracy where the better answer is shorter",
    "corrected_accuracy": "accuracy with the slope taken out",
    "accuracy": "accuracy as it is",
    "count": "pairs",
}
"""What the numbers of an evaluation's length bias mean; others are shown under their own names."""


@dataclass(frozen=True)
class Table:
    """A table of ready cells: printed by `str`, shown by a notebook, taken apart by the page and the terminal.

    Attributes:
        title: what it shows.
        columns: their heads.
        rows: cells, one a column.
        note: a sentence below, "" for none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[index]) for line in lines) for index in range(len(self.columns))]
        body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.title, *body, *([self.note] if self.note else [])])

    def html(self) -> str:
        """The table alone; columns that hold nothing but numbers stand to the right, with their heads."""
        numeric = [all(_is_number(row[index]) for row in self.rows) for index in range(len(self.columns))]
        classes = [" class='number'" if found else "" for found in numeric]
        head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(classes, self.columns, strict=True))
        rows = "".join(
            f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for kind, cell in zip(classes, row, strict=True))}</tr>"
            for row in self.rows
        )
        note = f"<p class='soft'>{escape(self.note)}</p>" if self.note else ""
        return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"<h4>{escape(self.title)}</h4>{self.html()}"


def _is_number(text: str) -> bool:
    """Whether a cell is a number, with or without a unit or an interval, or stands for a missing one."""
    return text == "-" or re.fullmatch(r"[-+]?[0-9][0-9.,e+-]*( %)?( (to|±) [-+]?[0-9][0-9.,e+-]*( %)?)?", text) is not None


def percent(share: float | None) -> str:
    """A share as text; "-" for none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    """A number as text; "-" for none."""
    return "-" if value is None else f"{value:.4g}"


def report_tables(stage: RewardStageData) -> list[Table]:
    """All that the evaluation of a reward model measured, one table a question; those without rows are left out."""
    tables = [
        accuracy_by_bucket(stage),
        accuracy_by_target(stage),
        calibration(stage),
        length_bias(stage),
        leakage(stage),
        grades(stage),
    ]
    return [table for table in tables if table.rows]


def accuracy_by_bucket(stage: RewardStageData) -> Table:
    """Share of held-out pairs ordered rightly, by difficulty, with intervals."""
    measured = by_bucket(stage.report)
    rows = [_accuracy_row(bucket, measured[bucket]) for bucket in stage.buckets if bucket in measured]
    overall = stage.report.get("pair_accuracy", {}).get("all")
    if rows and overall is not None:
        counts = sum(found["count"] for found in measured.values())
        rows.append(_accuracy_row("all", {"accuracy": overall, "count": counts}))
    return Table("Pair accuracy by difficulty", ("bucket", "pairs", "accuracy", "95 % interval"), tuple(rows))


def accuracy_by_target(stage: RewardStageData) -> Table:
    """Share of held-out pairs ordered rightly by each head, among the pairs that differ in its target."""
    measured = by_target(stage.report)
    rows = tuple(_accuracy_row(target, measured[target]) for target in stage.targets if target in measured)
    note = "Measured on pairs that differ in the target." if rows else ""
    return Table("Pair accuracy by target", ("target", "pairs", "accuracy", "95 % interval"), rows, note)


def _accuracy_row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    accuracy, count = found["accuracy"], int(found["count"])
    if accuracy is None:
        return name, str(count), "-", "-"
    low, high = wilson(accuracy, count)
    return name, str(count), percent(accuracy), f"{percent(low)} to {percent(high)}"


def calibration(stage: RewardStageData) -> Table:
    """Expected calibration error of each head, before and after its temperature."""
    rows = tuple(
        (target, number(found["temperature"]), number(found["ece_before"]), number(found["ece_after"]))
        for target, found in stage.report.get("calibration", {}).items()
        if found
    )
    return Table("Calibration", ("target", "temperature", "error before", "error after"), rows)


def length_bias(stage: RewardStageData) -> Table:
    """How far scores follow length."""
    found = stage.report.get("length_bias") or {}
    rows = tuple(
        (LENGTH_BIAS_WORDS.get(name, name.replace("_", " ")), number(value))
        for name, value in found.items()
        if value is None or isinstance(value, int | float)
    )
    return Table("Length bias", ("measure", "value"), rows)


def leakage(stage: RewardStageData) -> Table:
    """How often each head follows pairs that differ in another target alone."""
    rows = tuple(
        (differing, *(percent(heads.get(target)) for target in stage.targets)) for differing, heads in stage.leakage.items()
    )
    note = "A row: pairs that differ in this target alone. A column: how often this head prefers the better answer there."
    return Table("Leakage between targets", ("differs in", *stage.targets), rows, note if rows else "")


def grades(stage: RewardStageData) -> Table:
    """Correlation of scores with grades on graded answers."""
    rows = tuple(
        (target, str(int(found["count"])), number(found["pearson"]))
        for target, found in (stage.report.get("grades") or {}).items()
        if found
    )
    return Table("Graded answers", ("target", "answers", "correlation with the grade"), rows)


def surely_wrong(stage: RewardStageData, target: str | None = None, most: int = 8) -> Table:
    """Pairs that the model orders against their label with the widest lead: either is worth a human's look.

    Args:
        stage: with its held-out pairs.
        target: head that is asked; None takes the mean over the targets in which a pair differs.
        most: rows.
    """
    asked = stage.leads(target)
    wrong = sorted((found for found in asked if found[1] < 0), key=lambda found: found[1])
    rows = tuple((*_texts(pair), number(lead), ", ".join(pair.differing), pair.bucket or "-") for pair, lead in wrong[:most])
    note = f"{len(wrong)} of {len(asked)} pairs are ordered against their label."
    return Table(_titled("Surest mistakes", target), PAIR_COLUMNS, rows, note)


def most_uncertain(stage: RewardStageData, target: str | None = None, most: int = 8) -> Table:
    """Pairs whose lead is smallest against the ensemble's own spread: where one more label would tell most.

    Args: as `surely_wrong`.
    """
    spread = [(pair, lead, _lead_spread(pair, target)) for pair, lead in stage.leads(target)]
    known = sorted((found for found in spread if found[2] > 0), key=lambda found: abs(found[1]) / found[2])
    rows = tuple(
        (*_texts(pair), f"{lead:.3g} ± {deviation:.2g}", ", ".join(pair.differing), pair.bucket or "-")
        for pair, lead, deviation in known[:most]
    )
    note = "" if known else "The model has one head a target, so it does not say how sure it is."
    return Table(_titled("Least certain", target), PAIR_COLUMNS, rows, note)


def _titled(title: str, target: str | None) -> str:
    return title if target is None else f"{title} of {target}"


def _lead_spread(pair: ScoredPair, target: str | None) -> float:
    """Standard deviation of a lead, taking the deviations of answers and targets as independent."""
    targets = pair.differing if target is None else [target]
    return math.sqrt(sum(deviation**2 for name in targets for deviation in pair.spreads[name])) / len(targets)


def _texts(pair: ScoredPair) -> tuple[str, str, str]:
    return shorten(pair.prompt), shorten(pair.chosen), shorten(pair.rejected)


def shorten(text: str, most: int = LONGEST_CELL) -> str:
    """A text on one line, cut where it is longer than `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
