"""Rows of JSONL and Parquet files, each with its place for errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from posttrain.config.errors import UserError

FILE_KINDS = ("jsonl", "parquet")
"""Kinds of sources that are one file."""

Item = TypeVar("Item")


def read_rows(path: str | Path, kind: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a file in its order, whatever its columns; empty lines of JSONL are skipped.

    Args:
        path: the file.
        kind: jsonl or parquet; None goes by the ending, of which ".parquet" alone means Parquet.

    Raises:
        UserError: the file cannot be read, or a line is broken (named as file:line; rows of Parquet count from 1).
    """
    if not Path(path).is_file():
        raise UserError("no such file", where=str(path), instead="relative paths start at the folder the command runs in")
    if kind is None:
        kind = "parquet" if Path(path).suffix == ".parquet" else "jsonl"
    return _parquet_rows(path) if kind == "parquet" else _jsonl_rows(path)


def require_some(items: list[Item], path: str | Path) -> list[Item]:
    """The items. UserError when there is none."""
    if not items:
        raise UserError("no records", where=str(path))
    return items


def _jsonl_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_line(line, f"{path}:{number}")


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start})", where=where) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"invalid JSON ({error.msg}, column {error.colno})", where=where, instead="a line is one JSON object"
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"a {type(value).__name__}, not an object",
            where=where,
            instead='a line looks like {"prompt": ..., "completion": ...}',
        )
    return value


def _parquet_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"no readable Parquet file ({str(error).splitlines()[0]})", where=str(path)) from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", row
