"""The budget report fails a session that grew slow, and only then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.budgets import folder_of, over_budget, read_budgets

ROOT = Path(__file__).resolve().parents[2]

CONFTEST = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.project.budgets import BudgetPlugin

def pytest_configure(config):
    config.pluginmanager.register(BudgetPlugin(config.rootpath, Path(__file__).parent, {budgets!r}))
"""


def test_folders_over_their_budget_are_named() -> None:
    assert over_budget({"data": 5.0, "model": 1.0}, {"data": 4.0, "model": 2.0}) == {"data": "over its budget of 4 s"}


def test_a_folder_without_a_budget_is_named() -> None:
    assert over_budget({"data": 0.1}, {}) == {"data": "no budget in tests/budgets.toml"}


def test_a_test_belongs_to_its_first_folder() -> None:
    assert folder_of(Path("/r/tests/model/deep/test_a.py"), Path("/r/tests")) == "model"
    assert folder_of(Path("/r/tests/test_a.py"), Path("/r/tests")) == "."


@pytest.mark.parametrize("kind", ["quick", "slow"])
def test_every_test_folder_has_a_budget(kind: str) -> None:
    tests = ROOT / "tests"
    folders = {folder_of(path, tests) for path in tests.rglob("test_*.py")}
    assert folders <= set(read_budgets(tests / "budgets.toml", kind))


def test_all_budgets_together_fit_the_limits() -> None:
    quick, slow = (sum(read_budgets(ROOT / "tests/budgets.toml", kind).values()) for kind in ("quick", "slow"))
    assert quick <= 20 * 60
    assert quick + slow <= 75 * 60 - 20 * 60  # the tiny run takes up to 20 minutes


@pytest.mark.parametrize(("budget", "status", "said"), [(60.0, 0, "tests"), (0.01, 1, "over its budget of 0 s")])
def test_a_session_fails_when_a_folder_is_over_its_budget(tmp_path: Path, budget: float, status: int, said: str) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(root=str(ROOT), budgets={"part": budget}))
    (tmp_path / "part").mkdir()
    (tmp_path / "part/test_it.py").write_text("import time\n\ndef test_it():\n    time.sleep(0.05)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
    assert said in done.stdout.split("seconds by test folder")[1]
