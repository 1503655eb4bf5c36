"""What every test runs under: one thread, no network, fixed seeds; and the time budget of each test folder."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two cores are shared, and thread counts change the last bits of sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

import random  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.project.budgets import BudgetPlugin, read_budgets  # noqa: E402

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the budget report; `-m` tells whether slow tests run, which have budgets of their own."""
    tests = Path(__file__).parent
    expression = str(config.getoption("markexpr"))
    kind = "slow" if "slow" in expression and "not slow" not in expression else "quick"
    if "gpu" in expression and "not gpu" not in expression:
        kind = "gpu"
    config.pluginmanager.register(
        BudgetPlugin(config.rootpath, tests, read_budgets(tests / "budgets.toml", kind)), "posttrain-budgets"
    )


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for a test, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
