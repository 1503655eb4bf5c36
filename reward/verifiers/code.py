"""Programs, scored by the share of tests that they pass, in a sandbox."""

from __future__ import annotations

import ast
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from posttrain.config.errors import UserError
from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers.verdict import required, settings, verdict
from posttrain.sandbox.asserts.check import check_asserts
from posttrain.sandbox.running import SandboxError, run
from posttrain.sandbox.types import Limits, Program, Status

_FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_PYTHON = ("python", "py", "python3")
_LONGEST = 200  # characters of a test, and of a reason, in the evidence
_MOST_SHOWN = 20  # tests in the evidence


@dataclass(frozen=True)
class Case:
    """One test: standard input with the expected output, or statements that assert."""

    shown: str
    statements: str = ""
    stdin: str = ""
    stdout: str | None = None


@dataclass(frozen=True)
class Result:
    """What became of a test; `passed` is None where it cannot be judged."""

    passed: bool | None
    status: str
    reason: str


class CodeVerifier:
    """Runs the answer's program against the record's tests, each in a sandbox of its own (`posttrain.sandbox`).

    `metadata` of the record is {"language": "python", "tests": [...]}. A test is {"stdin": text, "stdout": text}, or Python
    statements that assert something of the program's names, as in MBPP; with "entry_point": name, statements that define
    `check(candidate)`, as in HumanEval. "setup" are statements before each test that asserts. What a program prints, how it ends
    and what it defines anew cannot make an assertion hold: see `posttrain.sandbox.asserts`.

    Args:
        limits: of each test.
        seconds: for all tests of an answer together; those that have not begun by then are not judged.
        workers: tests at once.
    """

    name = "code"

    def __init__(self, limits: Limits | None = None, seconds: float = 60.0, workers: int | None = None) -> None:
        self.limits, self.seconds = limits or Limits(), seconds
        self.workers = workers or min(4, os.cpu_count() or 1)

    def verify(self, sample: Sample) -> LevelScore:
        """Score the share of tests passed, each with its reason in the evidence; None where none failed and one cannot be judged.

        Raises:
            UserError: the record's tests are missing or malformed, or no sandbox can be made here.
        """
        tests = read_tests(sample)
        program = read_program(sample.answer)
        deadline = time.monotonic() + self.seconds
        with ThreadPoolExecutor(self.workers) as pool:
            results = list(pool.map(lambda test: self._judge(program, test, deadline), tests))
        passed = sum(result.passed is True for result in results)
        evidence: dict[str, Any] = {"passed": passed, "of": len(tests), "tests": _shown(tests, results)}
        outcomes = {result.passed for result in results}
        if None in outcomes and False not in outcomes:
            return verdict(None, evidence)
        return verdict(passed / len(tests), evidence)

    def _judge(self, program: str, test: Case, deadline: float) -> Result:
        if time.monotonic() > deadline:
            return Result(None, "not run", f"the {self.seconds:g} s for all tests were over")
        try:
            return self._run(program, test)
        except SandboxError as error:
            return Result(None, "sandbox failed", str(error))

    def _run(self, program: str, test: Case) -> Result:
        if test.stdout is None:
            answer = check_asserts(program, test.statements, self.limits)
            status = answer.outcome.status.value if answer.passed or answer.outcome.status is not Status.OK else "failed"
            return Result(answer.passed, status, answer.reason)
        outcome = run(Program.python(program, test.stdin), self.limits)
        if outcome.status is not Status.OK:
            return Result(False, outcome.status.value, outcome.reason)
        written = outcome.stdout.decode("utf-8", "replace")
        if same_output(written, test.stdout):
            return Result(True, "ok", "")
        return Result(False, "failed", f"wrote {written[: _LONGEST // 2]!r}, not {test.stdout[: _LONGEST // 2]!r}")


def read_program(answer: str) -> str:
    """The program in an answer: its last fenced block marked as Python, else its last fenced block, else all of it.

    A block that the answer does not close reaches to its end.
    """
    blocks = _FENCED.findall(answer)
    marked = [text for language, text in blocks if language.lower() in _PYTHON]
    return (marked or [text for _, text in blocks] or [answer])[-1]


def read_tests(sample: Sample) -> list[Case]:
    """The tests of a record.

    Raises:
        UserError: there are none, or one has another form, or the language is not Python.
    """
    required(sample, "metadata")
    record = settings(sample)
    language = record.get("language", "python")
    if language != "python":
        raise UserError(f"tests of programs in {language!r}", where="metadata", instead='only "python" can be run')
    tests = record.get("tests")
    if not isinstance(tests, list) or not tests:
        raise UserError("a record with code to be verified has no tests", where="metadata", instead='give "tests": [...]')
    before, after = record.get("setup", ""), ""
    if entry := record.get("entry_point"):
        if not (isinstance(entry, str) and entry.isidentifier()):
            raise UserError('"entry_point" is no name', where="metadata", instead="give the name of the function to be tested")
        after = f"\ncheck({entry})"
    if not isinstance(before, str):
        raise UserError('"setup" is no text', where="metadata", instead="give Python statements")
    return [_read_test(test, before, after, f"metadata: tests[{index}]") for index, test in enumerate(tests)]


def _read_test(test: Any, before: str, after: str, where: str) -> Case:
    match test:
        case str():
            statements = f"{before}\n{test}{after}".lstrip("\n")
            try:
                ast.parse(statements)
            except (SyntaxError, ValueError) as error:
                raise UserError(f"the test is no Python ({error})", where=where, instead="give statements that assert") from error
            return Case(test, statements)
        case {"stdin": str(stdin), "stdout": str(stdout)}:
            return Case(f"stdin {stdin!r}", stdin=stdin, stdout=stdout)
    raise UserError("the test has an unknown form", where=where, instead='give {"stdin": text, "stdout": text}, or statements')


def same_output(written: str, expected: str) -> bool:
    """Whether two texts are equal but for white space at the ends of lines and of the whole."""
    return _lines(written) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _shown(tests: Sequence[Case], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Tests for the evidence, those that did not pass first where there are many."""
    order = sorted(range(len(tests)), key=lambda index: results[index].passed is True)[:_MOST_SHOWN]
    return [
        {
            "test": tests[index].shown[:_LONGEST],
            "passed": results[index].passed,
            "status": results[index].status,
            "reason": results[index].reason[:_LONGEST],
        }
        for index in sorted(order)
    ]
