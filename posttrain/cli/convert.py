"""`posttrain convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    """Kinds of checkpoints, see docs/checkpoints.md."""

    official = "official"
    native = "native"
    posttrain = "posttrain"


def convert_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a checkpoint, of any kind.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; new or empty.", show_default=False)],
    to: Annotated[Kind, typer.Option("--to", help="Names of tensors and options to write.", show_default=False)],
) -> None:
    """Write a checkpoint under the names of the released files, of transformers, or our own; no value changes."""
    from posttrain.model.convert import convert

    entries = convert(source, target, to.value)
    gigabytes = sum(entry.nbytes for entry in entries) / 1e9
    typer.echo(f"done: {len(entries):,} tensors, {gigabytes:.3g} GB, in {target}")
