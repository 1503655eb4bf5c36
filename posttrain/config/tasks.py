"""Names of reasoning-gym's tasks and of their settings, read from its sources: importing it takes two seconds."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.names import suggest

_REGISTERED = re.compile(r'(?:^DATASET_NAME\s*=|register_dataset\()\s*"([a-z0-9_]+)"', re.MULTILINE)
_OURS = {"seed", "size"}  # settings that the run decides

WORKED_TASKS = ("basic_arithmetic", "chain_sum")
"""Tasks whose answers can be worked in steps (sources of kind graded_pairs)."""


@lru_cache(maxsize=1)
def quick_names() -> Mapping[str, Path]:
    """Tasks as the package's source files spell them, each with its file.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    spec = find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package reasoning-gym is not installed", instead="run `make install`")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return {name: file for file in folder.rglob("*.py") for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))}


@lru_cache(maxsize=32)
def quick_settings(task: str) -> frozenset[str] | None:
    """Names of a task's own settings; None where its source file does not tell them in the usual way.

    Args:
        task: one of `quick_names`.
    """
    tree = ast.parse(quick_names()[task].read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id == "register_dataset" and len(call.args) >= 3:
            settings = call.args[2]
            if isinstance(settings, ast.Name) and settings.id in classes and not classes[settings.id].bases:
                return frozenset(_fields(classes[settings.id])) - _OURS
    return None


def _fields(section: ast.ClassDef) -> list[str]:
    """Fields of a dataclass: its annotated names but class variables."""
    annotated = [node for node in section.body if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.dump(node.annotation)]
    return [node.target.id for node in annotated if isinstance(node.target, ast.Name)]


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


def check_settings(task: str, params: Mapping[str, Any], where: str) -> None:
    """See that a task has these settings; their values are the task's to judge when it is made.

    Args:
        task: an existing task.
        params: its settings. Those of `composite` name other tasks with settings of their own, which are checked too.
        where: place of `params`, named in errors with the setting's name below it.

    Raises:
        UserError: a setting that the task does not have, with the nearest one that it has.
    """
    known = quick_settings(task) if task in quick_names() else None
    for name in params:
        if known is not None and name not in known:
            raise UserError(
                f"task '{task}' has no setting '{name}'", where=f"{where}.{name}", instead=suggest(name, sorted(known))
            )
    parts = params.get("datasets") if task == "composite" else None
    for number, part in enumerate(parts if isinstance(parts, list) else ()):
        if isinstance(part, Mapping) and isinstance(part.get("name"), str):
            place = f"{where}.datasets.{number}"
            check_task(part["name"], f"{place}.name")
            if isinstance(part.get("config"), Mapping):
                check_settings(part["name"], part["config"], f"{place}.config")
