"""Names of reasoning-gym's tasks."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from posttrain.config.errors import UserError
from posttrain.config.names import suggest

_REGISTERED = re.compile(r'(?:^DATASET_NAME\s*=|register_dataset\()\s*"([a-z0-9_]+)"', re.MULTILINE)


@lru_cache(maxsize=1)
def quick_names() -> frozenset[str]:
    """Names of tasks as the package's source files spell them, without importing it, which takes two seconds.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    spec = find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package reasoning-gym is not installed", instead="run `make install`")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = folder.rglob("*.py")
    return frozenset(name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8")))


def check_task(task: str, where: str) -> None:
    """See that a task exists. Its import, the authority, is asked only for a name that the quick look does not know.

    Raises:
        UserError: no such task, with the nearest one.
    """
    if task in quick_names():
        return
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(f"unknown reasoning_gym task '{task}'", where=where, instead=suggest(task, DATASETS))
