"""Time budget of each test folder: a table at the end of a session, and a failed session when a folder takes longer.

The budgets keep the whole suite within its limit on two cores; a folder that outgrows its own is either made quicker or given
time that another one does not need.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from pathlib import Path

import pytest


def read_budgets(path: Path, kind: str) -> dict[str, float]:
    """Seconds for each folder from the table `kind` ("quick", "slow" or "gpu") of a TOML file."""
    with path.open("rb") as file:
        return {name: float(seconds) for name, seconds in tomllib.load(file)[kind].items()}


def folder_of(path: Path, tests: Path) -> str:
    """Name of the folder under `tests` that a test file is in ("." for one directly in it)."""
    relative = path.resolve().relative_to(tests.resolve())
    return relative.parts[0] if len(relative.parts) > 1 else "."


def over_budget(seconds: dict[str, float], budgets: dict[str, float]) -> dict[str, str]:
    """Folder -> what is wrong with it, for each folder that took longer than its budget or has none."""
    wrong = {}
    for folder, spent in seconds.items():
        if folder not in budgets:
            wrong[folder] = "no budget in tests/budgets.toml"
        elif spent > budgets[folder]:
            wrong[folder] = f"over its budget of {budgets[folder]:.0f} s"
    return wrong


class BudgetPlugin:
    """Adds up the seconds (set-up and clean-up included) of each folder's tests."""

    def __init__(self, root: Path, tests: Path, budgets: dict[str, float]) -> None:
        self.root, self.tests, self.budgets = root, tests, budgets
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        folder = folder_of(self.root / report.nodeid.split("::")[0], self.tests)
        self.seconds[folder] += report.duration
        self.counts[folder] += report.when == "call"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and over_budget(self.seconds, self.budgets):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.seconds:
            return
        wrong = over_budget(self.seconds, self.budgets)
        terminalreporter.section("seconds by test folder")
        for folder in sorted(self.seconds):
            budget = f"{self.budgets[folder]:6.0f}" if folder in self.budgets else "     -"
            row = (
                f"{folder:<12} {self.counts[folder]:5d} tests {self.seconds[folder]:8.1f} s of {budget}  {wrong.get(folder, '')}"
            )
            terminalreporter.write_line(row.rstrip(), red=folder in wrong)
