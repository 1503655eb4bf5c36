"""reasoning-gym tasks whose records depend on the order of Python's sets, made in a process where that order is fixed.

A set of strings is iterated in an order that changes with every process (`PYTHONHASHSEED`). Some tasks choose from such
sets, so that one seed would give other records in every process. They are generated in a child process with
`PYTHONHASHSEED=0`; the others, which are most, where they are asked for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.config.errors import UserError
from posttrain.data.formats import Record
from posttrain.data.reasoning import generate

# Measured on reasoning-gym 0.1.25 by comparing processes; a slow test measures again.
HASH_ORDERED = frozenset({"codeio", "isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder"})

RECORD_SECONDS = 600
"""A child that takes longer for one record is ended."""


def generate_stably(task: str, params: Mapping[str, Any], seed: int, where: str | None = None) -> Iterator[Record]:
    """As `posttrain.data.reasoning.generate`, with the same records in every process."""
    tasks = {task} | {str(spec.get("name")) for spec in params.get("datasets", []) if isinstance(spec, Mapping)}
    if sys.flags.hash_randomization and not tasks.isdisjoint(HASH_ORDERED):
        return _generate_in_child(task, params, seed, where)
    return generate(task, params, seed, where)


def _generate_in_child(task: str, params: Mapping[str, Any], seed: int, where: str | None) -> Iterator[Record]:
    command = [sys.executable, "-m", "posttrain.data.hash_stable", json.dumps([task, params, seed, where])]
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, encoding="utf-8")
    assert child.stdout is not None
    try:
        for line in child.stdout:
            kind, value = json.loads(line)
            if kind == "error":
                raise UserError(value[0], where=value[1], instead=value[2])
            yield value
        code = child.wait(timeout=30)
        if code == -signal.SIGALRM:
            raise UserError(
                f"task '{task}' took more than {RECORD_SECONDS} s for one record", where=where, instead="make it easier"
            )
        if code != 0:
            raise RuntimeError(f"generating task '{task}' ended with exit code {code}; its output is above")
    finally:
        # Reached early, too, when the caller has enough records of a stream without end.
        child.kill()
        child.stdout.close()
        child.wait(timeout=30)


def _main(arguments: str) -> None:
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # whatever a task prints must not mix with the records
    task, params, seed, where = json.loads(arguments)
    try:
        signal.alarm(RECORD_SECONDS)
        for record in generate(task, params, seed, where):
            lines.write(json.dumps(["record", record]) + "\n")
            lines.flush()
            signal.alarm(RECORD_SECONDS)
    except UserError as error:
        lines.write(json.dumps(["error", [error.what, error.where, error.instead]]) + "\n")
    except BrokenPipeError:
        os._exit(0)  # the parent is gone
    lines.close()


if __name__ == "__main__":
    _main(sys.argv[1])
