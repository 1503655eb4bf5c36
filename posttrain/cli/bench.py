"""`posttrain bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli import tables

bench_app = typer.Typer(rich_markup_mode=None)
_GROUPS = "forward, train, packed, decode, verify, mixed, ends"


@bench_app.callback(invoke_without_command=True)
def bench_root(context: typer.Context) -> None:
    """Measure this machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench_app.command("kernels")
def kernels_command(
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where to write the record and the picture.")] = Path(
        "runs/bench"
    ),
    only: Annotated[str | None, typer.Option("--only", metavar="NAME,...", help=f"Some of: {_GROUPS}.")] = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Also other libraries, where installed.")] = True,
) -> None:
    """Time the kernels on this GPU against the memory's floor and against FLA, vLLM and lightning-attn."""
    from posttrain.kernels.bench.report import tables as of_rows
    from posttrain.kernels.bench.run import compare

    names = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    terminal = tables.console()
    outcome = compare(output, names, peers, tell=lambda line: terminal.print(line, soft_wrap=True, markup=False))
    for table in of_rows(outcome.results["rows"]):
        tables.print_cells(table.title, table.columns, table.cells)
    typer.echo(f"copy {outcome.results['copy_gb_per_s']:,.0f} GB/s; written: {outcome.record}, {outcome.picture}, {outcome.log}")
    for line in outcome.broken:
        typer.echo(f"error: ours did not run: {line}", err=True)
    if outcome.broken:
        raise typer.Exit(1)
