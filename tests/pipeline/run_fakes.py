"""Runs fake steps in a process of its own, so that tests can interrupt or kill it: `run_fakes.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from posttrain.config.errors import UserError
from posttrain.pipeline.run import run
from tests.pipeline.configs import STEPS, make_config, sft

if __name__ == "__main__":
    try:
        run(make_config(Path(sys.argv[1]), {"one": sft()}), console=Console(file=sys.stdout), steps=STEPS)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
