"""What the process outside tells those inside, and how they answer. The order is marshalled, the answers are lines of words."""

from __future__ import annotations

import marshal
import os

INNER_ID = 1000
"""User and group that a program sees itself as."""


class Order:
    """A program to be run. A plain class, as all in this folder: `dataclasses` and its like take longer to import than all else.

    Attributes:
        argv: its command.
        environment: all of its environment.
        files: contents by relative path.
        limits: fields of `posttrain.sandbox.types.Limits`.
        visible: folders and files of the host to be read.
        hidden: folders below those that are empty in the sandbox.
        outer_id: user and group outside for `INNER_ID`, beside the caller's own as 0; None maps the caller itself to `INNER_ID`.
        parent: process that waits for the outcome.
        then: command that the launcher becomes once it is in its user namespace; empty where it makes the others itself.
    """

    def __init__(
        self,
        argv: list[str],
        environment: dict[str, str],
        files: dict[str, bytes],
        limits: dict[str, float],
        visible: list[str],
        hidden: list[str],
        outer_id: int | None,
        parent: int,
        then: list[str] | None = None,
    ) -> None:
        self.argv, self.environment, self.files, self.limits = argv, environment, files, limits
        self.visible, self.hidden = visible, hidden
        self.outer_id, self.parent, self.then = outer_id, parent, then or []

    def written(self) -> bytes:
        """The order as `read_order` reads it; by the same Python, so that marshal's format is the same."""
        return marshal.dumps(vars(self))


def read_order(descriptor: int) -> Order:
    """The order in the open file, read from its beginning whatever was read before."""
    return Order(**marshal.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0)))


def report(descriptor: int, *words: object) -> None:
    """Writes a line for the process outside: what happened, and its particulars."""
    os.write(descriptor, " ".join(" ".join(str(word).split()) for word in words).encode() + b"\n")


def report_failure(descriptor: int, error: Exception) -> None:
    """Says that the sandbox could not be made."""
    report(descriptor, "setup", error.strerror or error if isinstance(error, OSError) else error)
