"""Records of graded answers over reasoning-gym's sums: pairs, graded answers, demonstrations. Without end, without a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any, Literal

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.config.tasks import WORKED_TASKS
from posttrain.data.formats import Record
from posttrain.data.graded.answers import Traits, draw_details, grade, margins, write
from posttrain.data.graded.pairs import draw_contrast, draw_traits, even_out
from posttrain.data.graded.worked import WorkedSum, is_near, take_apart
from posttrain.data.reasoning import entry_from_json, generate

Emitted = Literal["pairs", "grades", "demonstrations"]

VERIFIER = "math"
"""Reads the number after the last "Answer:"; reasoning-gym's own scorer takes the bare number alone."""

_NEIGHBOURS = 16
_PATIENCE = 2000


def generate_graded(
    task: str,
    params: Mapping[str, Any],
    seed: int,
    emit: Emitted,
    pair_kinds: Mapping[str, float],
    where: str | None = None,
) -> Iterator[Record]:
    """Yield normalised records of a task, duplicates of prompts included, without end. Equal arguments give equal records.

    Prompts are the task's own questions, so that held-out prompts of a source of kind reasoning_gym are left out here too.

    Args:
        task: one of `posttrain.config.tasks.WORKED_TASKS`.
        params: its own settings: sums of + and - without parentheses, of at least three terms.
        seed: any non-negative number.
        emit: pairs gives `chosen`, `rejected`, `margins` and `pair_kind` (`posttrain.data.graded.pairs`); grades gives a
            `completion`, good or bad, and its `grades`; demonstrations gives a `completion` that is right, with its steps.
        pair_kinds: weight of each kind of pair (contrastive, single, near_tie, adversarial).
        where: place named in errors.

    Raises:
        UserError: another task, settings whose sums cannot be worked, no kind of pair with a weight above 0.
    """
    if task not in WORKED_TASKS:
        raise UserError(f"graded_pairs knows no steps of task '{task}'", where=where, instead=suggest(task, WORKED_TASKS))
    if not any(weight > 0 for weight in pair_kinds.values()):
        raise UserError("no kind of pair has a weight above 0", where=where, instead="write pair_kinds: {contrastive: 1.0}")
    for problem, neighbour in _with_neighbours(_problems(task, params, seed, where), where):
        random = Random(f"{seed}/{emit}/{problem.question}")
        yield _record(problem, neighbour, emit, pair_kinds, random)


def _record(problem: WorkedSum, neighbour: WorkedSum, emit: Emitted, pair_kinds: Mapping[str, float], random: Random) -> Record:
    details = draw_details(problem, neighbour, random)
    prompt: Record = {"prompt": [{"role": "user", "content": problem.question}]}
    reference: Record = {"verifier": VERIFIER, "answer": str(problem.answer)}
    if emit == "demonstrations":
        return prompt | {"completion": _assistant(write(problem, Traits(), details))} | reference
    if emit == "grades":
        traits = draw_traits(random)
        return prompt | {"completion": _assistant(write(problem, traits, details))} | reference | {"grades": grade(traits)}
    contrast = even_out(draw_contrast(pair_kinds, details, random), problem, random)
    chosen, rejected = (write(problem, traits, contrast.details) for traits in (contrast.better, contrast.worse))
    answers = {"chosen": _assistant(chosen), "rejected": _assistant(rejected)}
    labels = {"margins": margins(contrast.better, contrast.worse), "pair_kind": contrast.kind}
    return prompt | answers | reference | labels


def _problems(task: str, params: Mapping[str, Any], seed: int, where: str | None) -> Iterator[WorkedSum]:
    for record in generate(task, params, seed, where):
        entry = entry_from_json(record["metadata"])
        problem = take_apart(entry["question"], entry["metadata"]["expression"], where)
        if str(problem.answer) != record["answer"]:
            raise RuntimeError(f"the steps of '{problem.question}' end at {problem.answer}, the task says {record['answer']}")
        if len(set(problem.steps(problem.totals))) == len(problem.operations):  # 0+0=0 twice has no wrong order
            yield problem


def _with_neighbours(problems: Iterator[WorkedSum], where: str | None) -> Iterator[tuple[WorkedSum, WorkedSum]]:
    """Each problem with one of the last whose answer is plainly wrong for it; those without are left out."""
    last: deque[WorkedSum] = deque(maxlen=_NEIGHBOURS)
    alone = 0
    for problem in problems:
        right = problem.answer
        neighbour = next((other for other in last if other.answer != right and not is_near(other.answer, right)), None)
        if neighbour is not None:
            alone = 0
            yield problem, neighbour
        elif (alone := alone + 1) > _PATIENCE:
            raise UserError("all answers of the task are near each other", where=where, instead="widen the task's params")
        last.append(problem)


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
