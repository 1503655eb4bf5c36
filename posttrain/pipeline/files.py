"""Writing files so that a reader sees the old content or the new, and nothing between."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content: temporary file in the same folder, fsync, rename."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json_atomically(path: Path, value: Any) -> None:
    """`write_atomically` of a value as indented JSON with a final newline."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_output(path: Path) -> None:
    """UserError where a file that a user names cannot be written: its folder is missing or closed, or it is a folder itself."""
    if path.is_dir():
        raise UserError("a folder, not a file", where=str(path), instead="name a file in it")
    if not path.parent.is_dir():
        raise UserError("no such folder", where=str(path.parent), instead="make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError("the folder cannot be written to", where=str(path.parent))


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """`write_atomically` of a line a value; UserError of `check_output`."""
    check_output(path)
    write_atomically(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
