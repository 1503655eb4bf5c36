"""Which file, or the command line, gave each key: what an error names as its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Key = tuple[str, ...]


@dataclass
class Origins:
    """Remembers the last writer of each key.

    Attributes:
        default: place of keys that nobody wrote.
        writers: place of each written key, sections included.
    """

    default: str
    writers: dict[Key, str] = field(default_factory=dict)

    def record(self, key: Key, value: object, writer: str) -> None:
        """Note that `writer` gave `key`, and everything below it."""
        self.writers[key] = writer
        if isinstance(value, dict):
            for name, child in value.items():
                self.record((*key, str(name)), child, writer)

    def where(self, key: str | Sequence[str]) -> str:
        """`FILE: a.b.c`, where FILE wrote the key or, if nobody did, the nearest section around it."""
        parts = tuple(key.split(".")) if isinstance(key, str) else tuple(key)
        writers = (self.writers[parts[:length]] for length in range(len(parts), 0, -1) if parts[:length] in self.writers)
        return f"{next(writers, self.default)}: {'.'.join(parts)}"
