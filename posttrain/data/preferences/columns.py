"""Columns of a published schema, checked one by one, so that a wrong file is named by what it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.config.errors import UserError
from posttrain.data.formats import Message, Record, normalise

Row = Mapping[str, Any]


def value_of(row: Row, name: str, schema: str, where: str | None) -> Any:
    """A column's value. UserError, with the columns that there are, when it is missing or null."""
    if row.get(name) is None:
        raise UserError(
            f"no column '{name}' (columns: {', '.join(sorted(row)) or 'none'})",
            where=where,
            instead=f"format {schema} has it; set the source's format to what the file is",
        )
    return row[name]


def text_of(row: Row, name: str, schema: str, where: str | None) -> str:
    """A column of text. UserError otherwise."""
    value = value_of(row, name, schema, where)
    if not isinstance(value, str):
        raise _wrong(name, schema, "text", value, where)
    return value


def number_of(row: Row, name: str, schema: str, where: str | None, low: float, high: float) -> float:
    """A number within a scale, both ends included. UserError otherwise."""
    value = value_of(row, name, schema, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _wrong(name, schema, f"a number from {low:g} to {high:g}", value, where)
    return float(value)


def texts_of(row: Row, name: str, schema: str, where: str | None) -> list[str]:
    """A list of at least one text. UserError otherwise."""
    value = value_of(row, name, schema, where)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value or not all(isinstance(v, str) for v in value):
        raise _wrong(name, schema, "a list of texts", value, where)
    return list(value)


def prompt_of(row: Row, name: str, schema: str, where: str | None) -> list[Message]:
    """A prompt, text or messages, as messages. UserError when it is neither."""
    messages: list[Message] = normalise({"prompt": value_of(row, name, schema, where)}, where)["prompt"]
    return messages


def pair(
    prompt: Any, chosen: Any, rejected: Any, margins: Mapping[str, float], where: str | None, **fields: str | None
) -> Record:
    """A normalised pair; `prompt` None stands for the answers' common beginning, fields that are None are left out."""
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margins": dict(margins) or None, **fields}
    return normalise(row, where)


def _wrong(name: str, schema: str, wanted: str, value: Any, where: str | None) -> UserError:
    shown = repr(value)
    return UserError(
        f"'{name}' is {shown if len(shown) <= 60 else f'{shown[:57]}...'}", where=where, instead=f"{wanted} in format {schema}"
    )
