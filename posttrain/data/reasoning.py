"""Records from reasoning-gym: procedural tasks, each with its own scorer.

The library is imported when a task is used: it takes two seconds.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import lru_cache
from typing import Any

import numpy as np

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.data.formats import Record

Scorer = Callable[[str, dict[str, Any]], float]

# Some tasks make their whole pool when constructed, so pools start small. The sizes do not depend on how many records
# are asked for: the n-th record of a source is always the same.
_FIRST_CHUNK, _LAST_CHUNK = 256, 4096
_LARGEST_BLOCK = 32
_SEED_SPACE = 2**31  # some tasks hand seed + index to numpy, which takes 32 bits

_TUPLE, _ITEMS = "__tuple__", "__items__"


def generate(task: str, params: Mapping[str, Any], seed: int, where: str | None = None) -> Iterator[Record]:
    """Yield records of a task, duplicates included, without end unless the task has one.

    Equal arguments give equal records, for some tasks only under the same `PYTHONHASHSEED`: `generate_stably` sees to that.

    A record has `prompt`, `completion` (where the task knows an answer), `verifier` "reasoning_gym", `answer` and `metadata`:
    the task's entry as JSON, with `task` and `params`, so that it can be scored from the record alone.

    Args:
        task: name of a reasoning-gym task.
        params: its own settings, without seed and size.
        seed: any non-negative number; different seeds draw from different places.
        where: place named in errors.

    Raises:
        UserError: unknown task or setting, or settings that the task refuses.
    """
    base = int.from_bytes(hashlib.sha256(f"{task}/{seed}".encode()).digest()[:8], "big") % _SEED_SPACE
    start, size = 0, _FIRST_CHUNK
    while True:
        with _own_randomness():
            _seed(base + start)
            dataset = _create(task, params, where, seed=(base + start) % _SEED_SPACE, size=size)
        made = 0
        for entry in _entries(dataset, base + start, size):
            made += 1
            yield _record(entry, task, params)
        if not made:
            return
        start, size = start + size, min(2 * size, _LAST_CHUNK)


@dataclass(frozen=True)
class Entry:
    """What scores an answer.

    Attributes:
        task: name of the task.
        params: its settings, as JSON.
        values: the task's entry.
    """

    task: str
    params: str
    values: dict[str, Any]


def read_entry(metadata: str) -> Entry:
    """A record's `metadata`: the entry as JSON; without `task`, the entry's `source_dataset` names it.

    Raises:
        UserError: metadata is no entry of a known task, or the task refuses its settings.
    """
    values = entry_from_json(metadata)
    entry = Entry(*_task_of(values), values)
    _scorer(entry.task, entry.params)
    return entry


def score(answer: str, entry: Entry) -> float:
    """Score an answer with its task's own scorer, in [0, 1].

    Some scorers evaluate the answer as a program (`posttrain.reward.verifiers.reasoning_contained` lists them): a model's answers
    must go there.

    Raises:
        Exception: whatever the task's scorer raises on an answer it cannot read.
    """
    return float(_scorer(entry.task, entry.params)(answer, entry.values))


def entry_to_json(entry: Mapping[str, Any]) -> str:
    """An entry as JSON that `entry_from_json` restores exactly: tuples and keys that are not text are marked."""
    return json.dumps(_mark(entry), ensure_ascii=False)


def entry_from_json(text: str) -> dict[str, Any]:
    """The entry that `entry_to_json` wrote; plain JSON of an entry is read too. UserError when it is none."""
    try:
        entry = _unmark(json.loads(text))
    except ValueError as error:
        raise UserError(f"metadata is not JSON ({error})", instead="should be the JSON of a reasoning-gym entry") from error
    if not isinstance(entry, dict) or not {"question", "answer", "metadata"} <= entry.keys():
        raise UserError("metadata is not a reasoning-gym entry", instead="should be an object with question, answer and metadata")
    return entry


def _entries(dataset: Any, seed: int, size: int) -> Iterator[dict[str, Any]]:
    """A dataset's entries, up to where it has no more (word_ladder: the next pool, of another seed, goes on)."""
    index, block = 0, 1
    while index < size:
        entries: list[dict[str, Any]] = []
        with _own_randomness():  # a fifth of a millisecond, so for a growing number of entries at a time
            for i in range(index, min(index + block, size)):
                _seed(seed + i)
                try:
                    entries.append(dataset[i])
                except IndexError:
                    size = i
                    break
        yield from entries
        index, block = index + block, min(2 * block, _LARGEST_BLOCK)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Keep a task off the process's random states and its output: some draw from the global one, some seed it."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _record(entry: Mapping[str, Any], task: str, params: Mapping[str, Any]) -> Record:
    record: Record = {"prompt": [{"role": "user", "content": entry["question"]}]}
    answer = entry["answer"]
    if answer is not None:  # some tasks only check answers (any proof, any colouring)
        record["completion"] = [{"role": "assistant", "content": str(answer)}]
    record |= {"verifier": "reasoning_gym", "answer": "" if answer is None else str(answer)}
    source, source_params = task, dict(params)
    if task == "composite":
        source = entry["metadata"]["source_dataset"]
        source_params = _params_within(params, source)
    return record | {"metadata": entry_to_json({**entry, "task": source, "params": source_params})}


def _create(task: str, params: Mapping[str, Any], where: str | None, **size_and_seed: int) -> Any:
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        raise UserError(f"unknown reasoning_gym task '{task}'", where=where, instead=suggest(task, sorted(DATASETS)))
    known = {field.name for field in dataclass_fields(DATASETS[task][1])} - {"seed", "size"}
    for name in params:
        if name not in known:
            raise UserError(f"task '{task}' has no setting '{name}'", where=where, instead=suggest(name, known))
    arguments = dict(params)
    try:
        if task == "composite":
            arguments["datasets"] = [DatasetSpec(**{"weight": 1.0, "config": {}, **spec}) for spec in params.get("datasets", [])]
        return create_dataset(task, **arguments, **size_and_seed)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"task '{task}' refuses its settings ({error or 'no reason given'})", where=where) from error


def _task_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    details = entry["metadata"]
    task = entry.get("task") or (details.get("source_dataset") if isinstance(details, dict) else None)
    params = entry.get("params") or {}
    if task == "composite":  # it would hand the answer on to the scorer of the task that made the entry
        task = details.get("source_dataset") if isinstance(details, dict) else None
        params = _params_within(params, task)
    if not isinstance(task, str) or task == "composite":
        raise UserError("metadata names no reasoning_gym task", instead="its entry needs 'task' or metadata.source_dataset")
    return task, json.dumps(params, sort_keys=True)


def _params_within(params: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """Settings of a task within those of `composite`."""
    return next((dict(spec.get("config", {})) for spec in params.get("datasets", ()) if spec["name"] == task), {})


@lru_cache(maxsize=128)
def _scorer(task: str, params: str) -> Scorer:
    # Of a dataset with the record's own settings: several scorers read them (precision, word lengths, board format).
    scorer: Scorer = _create(task, json.loads(params), None, seed=0, size=1).score_answer
    return scorer


def _mark(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TUPLE: [_mark(item) for item in value]}
    if isinstance(value, list):
        return [_mark(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _mark(item) for key, item in value.items()}
        return {_ITEMS: [[_mark(key), _mark(item)] for key, item in value.items()]}
    return value


def _unmark(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmark(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_TUPLE}:
            return tuple(_unmark(item) for item in value[_TUPLE])
        if value.keys() == {_ITEMS}:
            return {_unmark(key): _unmark(item) for key, item in value[_ITEMS]}
        return {key: _unmark(item) for key, item in value.items()}
    return value
