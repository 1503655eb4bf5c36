"""`check_asserts`: whether a program keeps what assert statements demand of it."""

from __future__ import annotations

import functools
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from posttrain.sandbox.running import run
from posttrain.sandbox.types import INTERPRETER, Limits, Outcome, Program, Status

_FOLDER = Path(__file__).parent
_INSIDE = "posttrain/sandbox/asserts"
# Isolated: nothing is imported from the working folder, which the program can write to, but our own modules before it runs.
_JUDGE = "import sys; sys.path.insert(0, '.'); from posttrain.sandbox.asserts.judge import main; sys.path.pop(0); main()"


@dataclass(frozen=True)
class Verdict:
    """What a test says about a program.

    Attributes:
        passed: whether it held; None where the test cannot be judged, which is the test's fault.
        reason: why not, one line; "" where it held.
        outcome: how the sandbox's run ended.
    """

    passed: bool | None
    reason: str
    outcome: Outcome


def check_asserts(program: str, test: str, limits: Limits | None = None, mechanism: str | None = None) -> Verdict:
    """Runs Python statements against a Python program, in one sandbox and two processes.

    What the program returns reaches the test as plain data (numbers, text, bytes, lists, tuples, dictionaries, sets, None),
    instances of subclasses as their base. Other objects can be called, iterated over, asked for attributes, items and length;
    they are equal to nothing but themselves. Functions of the test cannot be given to the program.

    Args:
        program: source of the program; it runs once, under another name than `__main__`.
        test: statements that use the program's names; passed when they end without an exception.
        limits: of both processes together; None takes the defaults.
        mechanism: see `run`.

    Raises:
        UserError: no sandbox can be made here.
    """
    nonce = secrets.token_hex(16)
    order = json.dumps({"nonce": nonce, "program": program, "test": test})
    files = {**_own_files(), "program.py": program}
    outcome = run(Program((INTERPRETER, "-I", "-S", "-B", "-c", _JUDGE), files, order), limits, mechanism)
    if outcome.status not in (Status.OK, Status.FAILED):
        return Verdict(False, outcome.reason, outcome)
    try:
        answer = json.loads(outcome.stdout)
        if answer["nonce"] == nonce:
            return Verdict(answer["passed"], str(answer["reason"]), outcome)
    except (ValueError, TypeError, KeyError):
        pass
    return Verdict(False, outcome.reason or "the judge was kept from its verdict", outcome)


@functools.cache
def _own_files() -> dict[str, str]:
    files = {f"{_INSIDE}/{name}.py": (_FOLDER / f"{name}.py").read_text() for name in ("judge", "subject", "values")}
    return {"posttrain/__init__.py": "", "posttrain/sandbox/__init__.py": "", f"{_INSIDE}/__init__.py": "", **files}
