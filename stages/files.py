"""Writing small files so that a reader sees the old one or the whole new one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and give it the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace_file(path, lambda temporary: _put(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; UserError naming it where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("file is missing", where=str(path)) from None
    except json.JSONDecodeError as error:
        raise UserError(f"broken JSON in line {error.lineno}", where=str(path)) from None


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; UserError naming file and line where it is missing or broken."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError("file is missing", where=str(path)) from None
    records = []
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                raise UserError("broken JSON", where=f"{path}:{number}") from None
    return records


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
