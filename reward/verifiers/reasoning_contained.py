"""Scoring by those reasoning-gym tasks whose scorers evaluate text as a program.

Two guards, since either alone would not do. An answer that calls anything but a mathematical function is refused before it is
evaluated: within the scorer's process it could name its own score. What is left can still take for ever (`9**9**9**9`), so it is
evaluated in a sandbox (`posttrain.sandbox`), in a process of its own for each answer. That costs about 0.6 s, and 1.5 s
of processor time where sympy is imported.

A few more scorers evaluate no answer and run here, but read numbers of any size or evaluate the record: see `check_uncontained`.
"""

from __future__ import annotations

import json
import marshal
import os
import re
import signal
from collections.abc import Callable, Mapping
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.tasks import quick_names
from posttrain.data.reasoning import Entry

SCORING_SECONDS = 5.0  # of processor time; sympy takes up to two for an honest integral
_WORKER = Path(__file__).with_name("reasoning_worker.py")
_LIBRARIES = ("reasoning_gym", "numpy", "sympy")


class Evaluates(Enum):
    """What a scorer evaluates."""

    VALUE = "the answer, as a Python value"
    FORMULA = "the answer, as a formula of sympy"


EVALUATING: Mapping[str, Evaluates] = {
    "binary_matrix": Evaluates.VALUE,
    "n_queens": Evaluates.VALUE,
    "spiral_matrix": Evaluates.VALUE,
    "string_insertion": Evaluates.VALUE,
    "countdown": Evaluates.FORMULA,
    "intermediate_integration": Evaluates.FORMULA,
    "polynomial_multiplication": Evaluates.FORMULA,
    "puzzle24": Evaluates.FORMULA,
    "simple_integration": Evaluates.FORMULA,
}
"""Every task of reasoning-gym 0.1.25 whose scorer evaluates the answer."""

EVALUATED_RECORDS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "bitwise_arithmetic": lambda values: values["metadata"]["problem"],
    "number_sorting": lambda values: values["answer"],
}
"""Tasks whose scorers evaluate a text of the entry, and which."""

_HUGE = re.compile(r"e[+-]?[\d_]{4,}", re.I)  # coin_flip writes such a number out: "1e999999999" takes all memory

_FUNCTIONS = frozenset(
    "abs Abs sqrt cbrt exp log ln sin cos tan sec csc cot asin acos atan sinh cosh tanh asinh acosh atanh factorial".split()
)
# A bracket opens a call unless it stands at the beginning or after one of these.
_BEFORE_GROUP = frozenset("([{,+-*/%=<>&|^~!")
_TOKEN = re.compile(r"\w+|\S")
# Strings, which sympy evaluates in turn, and the ways to one without a quote.
_TEXT = re.compile(r"[\"'\[\]{}]|\.\s*[A-Za-z_]|[^\x00-\x7f]")


def refusal(answer: str, evaluates: Evaluates) -> str | None:
    """Why an answer must not be evaluated, or None where evaluating it runs nothing but arithmetic.

    Without calls an expression of Python runs no code but that of operators of built-in types.
    """
    formula = evaluates is Evaluates.FORMULA
    if "#" in answer or "\\" in answer:  # comments and continued lines would part a name from its bracket
        return "holds a comment or a backslash"
    previous = ""
    for token in _TOKEN.findall(answer):
        if token == "(" and previous and previous not in _BEFORE_GROUP and not (formula and previous in _FUNCTIONS):
            return "calls something" + (" that is no mathematical function" if formula else "")
        previous = token
    if formula and _TEXT.search(answer):
        return "is no formula of numbers, names and functions"
    return None


def check_uncontained(answer: str, entry: Entry) -> str | None:
    """Why an answer must not be scored by a task outside `EVALUATING`, or None.

    Raises:
        UserError: the entry, which the scorer evaluates, holds a call; somebody's file wants to run a program.
    """
    if entry.task in EVALUATED_RECORDS:
        text = EVALUATED_RECORDS[entry.task](entry.values)
        reason = refusal(text, Evaluates.VALUE) if isinstance(text, str) else "holds no text"
        if reason is not None:
            problem = f"an entry of task '{entry.task}' {reason} where its scorer evaluates it"
            raise UserError(problem, instead="take records that the task made")
    return "names a huge number" if entry.task == "coin_flip" and _HUGE.search(answer) else None


def score_contained(answer: str, entry: Entry) -> tuple[float | None, dict[str, Any]]:
    """Score an answer by a task of `EVALUATING`.

    Returns:
        The score, 0 where the answer is refused or exceeds a limit, None where the scorer cannot read it or the sandbox failed;
        and evidence, with the reason where there is one.

    Raises:
        UserError: no sandbox can be made here, or the library cannot be imported in one.
    """
    from posttrain.sandbox.running import SandboxError, available, run
    from posttrain.sandbox.types import INTERPRETER, Limits, Program, Status

    evaluates = EVALUATING[entry.task]
    if reason := available():
        problem = f"scoring task '{entry.task}' evaluates {evaluates.value}, and no program can be run contained on this machine"
        raise UserError(problem, instead=reason)
    if reason := refusal(answer, evaluates):
        return 0.0, {"reason": f"the answer {reason}"}
    folders = _folders()
    order = (
        folders,
        _module(entry.task, folders[0]),
        entry.task,
        json.loads(entry.params),
        answer,
        entry.values,
        SCORING_SECONDS,
    )
    program = Program(
        (INTERPRETER, "-I", "-B", "main.py"), {"main.py": _WORKER.read_text(encoding="utf-8")}, marshal.dumps(order)
    )
    try:
        outcome = run(program, Limits(wall_seconds=60, cpu_seconds=30, processes=8), shown=folders)
    except SandboxError as error:
        return None, {"sandbox failed": str(error)}
    lines = outcome.stdout.decode("utf-8", "replace").splitlines()
    if not lines:
        said = (outcome.stderr.decode("utf-8", "replace").strip().splitlines() or [outcome.reason])[-1]
        raise UserError(
            f"the scorer of task '{entry.task}' does not start in a sandbox ({said})", instead=f"see that {folders} can be read"
        )
    if outcome.status is Status.OK:
        result = json.loads(lines[-1])
        return result.pop("score", None), result
    late = outcome.status is Status.KILLED and signal.SIGPROF.name in outcome.reason
    return 0.0, {"reason": f"takes more than {SCORING_SECONDS:g} s of processor time" if late else outcome.reason}


def _folders() -> list[str]:
    """Folders of installed packages that the scorers need, that of reasoning-gym first."""
    places = [spec.submodule_search_locations for name in _LIBRARIES if (spec := find_spec(name)) is not None]
    return list(dict.fromkeys(os.path.dirname(os.path.realpath(next(iter(place)))) for place in places if place))


def _module(task: str, folder: str) -> str:
    return ".".join(Path(os.path.realpath(quick_names()[task])).relative_to(folder).with_suffix("").parts)
