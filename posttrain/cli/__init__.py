"""The command line: parse, call, print. Commands import what they need when they run, so that `plan` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.cli.commands import app

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `posttrain.cli.commands.run`.

    Args:
        arguments: words after the program's name; None takes them from the process, and may end it.

    Returns:
        Exit status.
    """
    try:
        from posttrain.cli.commands import run
    except KeyboardInterrupt:  # nothing has begun yet
        print("error: interrupted", file=sys.stderr)
        return 130
    status = run(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and status != 0:
        # A run that was stopped can leave threads inside a library's import or its native code, where Python's own ending
        # crashes now and then; all that matters is closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def __getattr__(name: str) -> Any:
    if name == "app":
        from posttrain.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
