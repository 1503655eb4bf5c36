"""The command line: parse, call, print. Commands import what they need when they run, so that `plan` answers at once."""

from __future__ import annotations

from posttrain.cli.app import app, main

__all__ = ["app", "main"]
