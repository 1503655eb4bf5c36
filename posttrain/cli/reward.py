"""`posttrain reward`: train reward models, and print what their evaluation measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli import tables
from posttrain.config import load_config

Stage = Annotated[str | None, typer.Option("--stage", metavar="NAME", help="This stage alone, and what it needs.")]


def reward_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options to change, such as stages.reward.ensemble=3.", show_default=False),
    ] = None,
    stage: Stage = None,
) -> None:
    """Train the reward models, and what they start from; print accuracy, calibration and length bias."""
    from posttrain.cli.selection import stages_of_kind

    loaded = load_config(config, overrides or ())
    names = stages_of_kind(loaded, "reward", stage, str(config))
    from posttrain.pipeline.run import run

    for name in names:
        folder = run(loaded, only=name, console=tables.console())
    print_reward_reports(folder.path, names)
    typer.echo(f"done: {', '.join(names)}; see `posttrain report {tables.short(folder.path)}`")


def print_reward_reports(run_folder: Path, stages: list[str]) -> None:
    """The tables of each reward stage's evaluation, under its name."""
    from posttrain.pipeline.report import read_run
    from posttrain.pipeline.reward_data import reward_run
    from posttrain.pipeline.reward_tables import report_tables

    found = reward_run(read_run(run_folder))
    for name in stages:
        typer.echo(f"\nreward model {name}")
        for table in report_tables(found.stage(name)):
            tables.print_table(table)
