"""Tables for a terminal, and the same without one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from posttrain.cli.doctor import Finding
    from posttrain.pipeline.plan import Plan
    from posttrain.pipeline.report import Row
    from posttrain.pipeline.reward_tables import Table as Cells

_COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}
_WIDE = 160


def console() -> Console:
    """The terminal; into a file or a pipe lines are wide enough that tables are not cut."""
    found = Console(highlight=False)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_WIDE)


def _table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def print_plan(plan: Plan) -> None:
    """The nodes of a run in order, with what each waits for and occupies."""
    table = _table("node", "makes", "after", "state", "CPUs", "GPUs", numbers=("CPUs", "GPUs"))
    for row in plan.rows:
        state = Text("done" if row.cached else f"to do ({row.reason})", style="green" if row.cached else "")
        table.add_row(row.node, row.kind, ", ".join(row.parents) or "-", state, str(row.cpus), str(row.gpus))
    output = console()
    output.print(table)
    left = sum(not row.cached for row in plan.rows)
    output.print(f"{left} of {len(plan.rows)} nodes to do; folder {plan.folder}", soft_wrap=True)


def print_report(rows: Sequence[Row]) -> None:
    """A run's table: a row a stage."""
    from posttrain.pipeline.report import COLUMNS, row_cells

    table = _table(*COLUMNS, numbers=COLUMNS[1:])
    for row in rows:
        table.add_row(*row_cells(row))
    console().print(table)


def print_cells(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of ready cells under its title; all columns but the first hold numbers."""
    table = _table(*columns, numbers=columns[1:])
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    output = console()
    output.print(Text(f"\n{title}", style="bold"))
    output.print(table)


def print_table(table: Cells) -> None:
    """A ready table with its note."""
    print_cells(table.title, table.columns, table.rows)
    if table.note:
        console().print(Text(table.note))


def short(path: Path) -> Path:
    """The path from the current folder, where it is inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def print_findings(findings: Sequence[Finding]) -> None:
    """What `doctor` found."""
    table = _table("", "what", "found", "meaning")
    for finding in findings:
        table.add_row(Text(finding.state, style=_COLOURS[finding.state]), finding.what, finding.found, finding.meaning)
    console().print(table)
