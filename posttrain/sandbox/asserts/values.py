"""Plain data as JSON, types kept: what may cross between a judge and a program that it does not trust.

Whatever comes in, `decode` makes new objects of Python's own types, or opaque handles; no code comes with it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # slow to import
    from collections.abc import Callable
    from typing import Any

sys.set_int_max_str_digits(0)  # large integers are right answers too; time is bounded elsewhere

_SEQUENCES: dict[str, type[tuple] | type[set] | type[frozenset]] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, handle: Callable[[Any], Any]) -> Any:
    """JSON value of plain data; instances of subclasses count as their base.

    Args:
        value: what to encode.
        handle: gives the JSON value that stands for anything else, or raises.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, handle) for item in value]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, handle) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, handle), encode(item, handle)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__ if type(value) in (bytes, bytearray) else "bytes": bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    return {"handle": handle(value)}


def decode(value: Any, handle: Callable[[int], Any]) -> Any:
    """The data that `encode` was given.

    Raises:
        ValueError: not what `encode` makes.
        TypeError: an unhashable member of a set, or key.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, handle) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("not encoded data")
    ((name, content),) = value.items()
    if name in _SEQUENCES:
        return _SEQUENCES[name](decode(item, handle) for item in content)
    match name:
        case "dict":
            return {decode(key, handle): decode(item, handle) for key, item in content}
        case "bytes":
            return content.encode("latin-1")
        case "bytearray":
            return bytearray(content.encode("latin-1"))
        case "complex":
            return complex(*content)
        case "handle" if isinstance(content, int):
            return handle(content)
    raise ValueError(f"unknown kind of data {name!r}")
