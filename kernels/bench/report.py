"""The tables of a comparison, as plain cells that a terminal can lay out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.kernels.bench.rows import GROUPS, OURS


@dataclass(frozen=True)
class Table:
    """One group of rows.

    Attributes:
        title: of the group.
        columns: names; all but the first are numbers.
        cells: a list a row.
    """

    title: str
    columns: list[str]
    cells: list[list[str]]


def tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each group of a record's rows, in the order of GROUPS."""
    found = []
    for group, title in GROUPS.items():
        members = [row for row in rows if row["group"] == group]
        if members:
            found.append(_table(title, members))
    return found


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    others = list(dict.fromkeys(name for row in rows for name in row["results"] if name != OURS))
    baseline = next((row["baseline"] for row in rows if "baseline" in row), None)
    columns = ["case", "floor, ms", "ours, ms", "of the floor", *(f"{name}, ms" for name in others)]
    columns += ["speed-up"] if any("speed_up" in row for row in rows) else []
    columns += [f"times {baseline}"] if baseline else []
    return Table(title, columns, [_cells(row, others, columns) for row in rows])


def _cells(row: Mapping[str, Any], others: Sequence[str], columns: Sequence[str]) -> list[str]:
    results = row["results"]
    ratio = row.get("of_floor", {}).get(OURS)
    found = [row["case"], _figure(row["floor_ms"] or None), _result(results.get(OURS)), _figure(ratio, 3)]
    found += [_result(results.get(name)) for name in others]
    if "speed-up" in columns:
        found.append(_figure(row.get("speed_up"), 3))
    if len(found) < len(columns):
        found.append(_figure(row.get("cost"), 3))
    return found


def _result(result: Mapping[str, Any] | None) -> str:
    """A time, with `*` where a graph was wanted and the host's work is in it; or what else was found."""
    if result is None:
        return "-"
    if "ms" in result:
        return _figure(result["ms"]) + "*" * ("no_graph" in result)
    if "extra_gib" in result:
        return f"{result['extra_gib']:.3f} GiB beyond ({result['heads']} heads)"
    return "not installed" if "absent" in result else f"failed: {result['failed']}"[:40]


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:,.0f}"
