"""Named sources of a run: reading them, cutting disjoint splits, joining many-shot conversations."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.config.schema import RunConfig, SourceSection
from posttrain.config.source_checks import GENERATED_KINDS
from posttrain.data.files import FILE_KINDS, read_rows, require_some
from posttrain.data.formats import Record, normalise, prompt_key
from posttrain.data.graded.generate import generate_graded
from posttrain.data.hash_stable import generate_stably
from posttrain.data.preferences.adapt import adapt

ALL = "train"
"""The split that holds everything when a source names no splits, and that a bare source name means."""

# A generator is exhausted when this many draws in a row (or four times what was found, if more) repeat known prompts:
# the last of N equally likely prompts takes N draws on average.
_PATIENCE = 2000


def load_split(config: RunConfig, ref: str) -> list[Record]:
    """Normalised records of "SOURCE/SPLIT" ("SOURCE" means "SOURCE/train").

    Deterministic from the config. Prompts are distinct: of records with the same prompt the first stays; of
    preference pairs all stay, within one split. Splits of a source share no prompt, and no split shares one with the held-out
    prompts of `eval.source`, also where that is another source over the same task, nor with the sources it is `disjoint_from`;
    for many-shot sources this holds for every turn.

    Raises:
        UserError: unknown source or split, unreadable or broken data, or fewer distinct prompts than the splits ask for.
    """
    name, split = resolve(config, ref)
    return next(records for found, records in _splits(config, name) if found == split)


def check_files(config: RunConfig, refs: Iterable[str], answered: Collection[str] = ()) -> None:
    """Read the files that these splits are cut from, and those left out of them, so that a mistake in one is found early.

    Generators and datasets of the hub are not touched. Where records of theirs are left out, a split may turn out to be too
    large later; what is refused here is wrong in any case.

    Args:
        refs: "SOURCE/SPLIT" references.
        answered: those of them whose records are prompts for the model, with a verifier for its answers.

    Raises:
        UserError: a broken line or file, no records, a split larger than its file, a record without prompt or verifier.
    """
    asked = {"/".join(resolve(config, ref)) for ref in answered}
    for name in _read_for(config, refs):
        if config.sources[name].kind in FILE_KINDS:
            for split, records in _splits(config, name, files_only=True):
                if f"{name}/{split}" in asked:
                    _require_answerable(records, f"{name}/{split}")


def _read_for(config: RunConfig, refs: Iterable[str]) -> list[str]:
    """Sources that are read to load these splits, in the order of the config."""
    waiting, found = [resolve(config, ref)[0] for ref in refs], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [*config.sources[name].disjoint_from, resolve(config, config.eval.source)[0]]
    return [name for name in config.sources if name in found]


def _require_answerable(records: list[Record], ref: str) -> None:
    for field in ("prompt", "verifier"):
        lacking = sum(field not in record for record in records)
        if lacking:
            raise UserError(
                f"{lacking} of {len(records)} records have no '{field}'",
                where=ref,
                instead="records that the model answers need a prompt, and a verifier of the answer",
            )


Unit = list[Record]
"""Records of one prompt, which no two splits may share."""


def _splits(config: RunConfig, name: str, *, files_only: bool = False) -> Iterator[tuple[str, list[Record]]]:
    """Splits of a source with their records, in the order given; with `files_only`, files alone are left out of them."""
    source = config.sources[name]
    excluded = _left_out(config, name, files_only)
    generated = source.kind in GENERATED_KINDS
    units = _distinct(_read(config, name), excluded, patience=_PATIENCE if generated else None)
    units = _joined(units, source.shots, where=f"sources.{name}")
    if not source.splits:
        if generated:
            raise UserError("a generator has no end", where=f"sources.{name}", instead="name its splits: splits: {train: 1000}")
        yield ALL, [record for unit in units for record in unit]
    for split, size in source.splits.items():
        taken = _take(units, size)
        if len(taken) < size:
            _refuse_short(name, source, split, len(taken))
        yield split, taken


def _take(units: Iterator[Unit], size: int) -> list[Record]:
    """The next `size` records, fewer at the end. What the last unit has beyond them lies in no split: it shares a prompt."""
    taken: list[Record] = []
    while len(taken) < size and (unit := next(units, None)) is not None:
        taken += unit[: size - len(taken)]
    return taken


def resolve(config: RunConfig, ref: str) -> tuple[str, str]:
    """Source and split that a reference names. UserError when there are no such."""
    name, _, split = ref.partition("/")
    split = split or ALL
    if name not in config.sources:
        raise UserError(f"unknown source '{name}'", where=ref, instead=suggest(name, config.sources))
    known = list(config.sources[name].splits) or [ALL]
    if split not in known:
        raise UserError(f"source '{name}' has no split '{split}'", where=ref, instead=suggest(split, known))
    return name, split


def _left_out(config: RunConfig, name: str, files_only: bool) -> set[str]:
    """Keys of the single turns of the evaluation's records, unless they come from this very source, and of `disjoint_from`."""
    wanted = {other: list(config.sources[other].splits or [ALL]) for other in config.sources[name].disjoint_from}
    evaluated, split = resolve(config, config.eval.source)
    if evaluated != name:
        wanted.setdefault(evaluated, [split])
    keys: set[str] = set()
    for other, splits in wanted.items():
        if files_only and config.sources[other].kind not in FILE_KINDS:
            continue
        waiting = set(splits)
        for found, records in _splits(config, other, files_only=files_only):
            if found in waiting:
                keys.update(key for record in records for key in _turn_keys(record))
                waiting.remove(found)
            if not waiting:
                break  # a generator need not make the splits after these
    return keys


def _turn_keys(record: Record) -> Iterator[str]:
    yield prompt_key(record)
    messages = record.get("prompt", ())
    for message in messages:
        if message["role"] == "user":
            yield prompt_key({"prompt": [message]})


def _distinct(units: Iterable[Unit], excluded: set[str], patience: int | None) -> Iterator[Unit]:
    """Units with a new prompt outside `excluded`; ends early after too many repetitions."""
    seen: set[str] = set()
    repeated = 0
    for unit in units:
        key = prompt_key(unit[0])
        if key in seen or not excluded.isdisjoint(_turn_keys(unit[0])):
            repeated += 1
            if patience is not None and repeated > max(patience, 4 * (len(seen) + len(excluded))):
                return
            continue
        seen.add(key)
        repeated = 0
        yield unit


def _joined(units: Iterator[Unit], shots: int, where: str) -> Iterator[Unit]:
    """Conversations of `shots` records each; an incomplete last one is left out."""
    if shots == 1:
        yield from units
        return
    records = (record for unit in units for record in unit)
    while len(group := list(islice(records, shots))) == shots:
        yield [_conversation(group, where)]


def _conversation(group: list[Record], where: str) -> Record:
    """One conversation of all the records' turns: the last answer completes it and is what a verifier checks."""
    prompt: list[dict[str, str]] = []
    for record in group:
        if "prompt" not in record or "completion" not in record:
            raise UserError(
                "many-shot conversations need records with a prompt and an answer", where=where, instead="use shots: 1"
            )
        turns = [message for message in record["prompt"] if message["role"] != "system" or not prompt or message not in prompt]
        prompt += [*turns, *record["completion"]]
    last = group[-1]
    return {
        **last,
        "prompt": prompt[: len(prompt) - len(last["completion"])],
        "completion": last["completion"],
        "train_on_all_answers": True,
    }


def _refuse_short(name: str, source: SourceSection, split: str, found: int) -> None:
    names = list(source.splits)
    before = sum(source.splits[earlier] for earlier in names[: names.index(split)])
    unit = f"conversations of {source.shots} turns" if source.shots > 1 else "records"
    generated = source.kind in GENERATED_KINDS
    origin = f"task '{source.task}'" if generated else f"'{source.path}'"
    after = f" after the {before} of earlier splits" if before else ""
    raise UserError(
        f"split '{split}' asks for {source.splits[split]} {unit}, {origin} has only {found} with distinct prompts{after}",
        where=f"sources.{name}.splits.{split}",
        instead="ask for fewer, or widen the task's params" if generated else "ask for fewer",
    )


def _read(config: RunConfig, name: str) -> Iterator[Unit]:
    source, where = config.sources[name], f"sources.{name}"
    if source.kind in GENERATED_KINDS:
        if not source.task:
            raise UserError("no task given", where=where, instead="name one: task: chain_sum")
        return ([record] for record in _generated(source, source.task, config.seed, f"{where}.task"))
    if not source.path:
        raise UserError("no path given", where=where, instead="name the file or dataset: path: data.jsonl")
    rows = read_rows(source.path, source.kind) if source.kind in FILE_KINDS else _hub_rows(source, where)
    units = _units(rows, source)
    # Files are often sorted by topic; splits cut from them in file order would differ in kind.
    random.Random(f"{config.seed}/{name}").shuffle(units)
    return iter(units)


def _generated(source: SourceSection, task: str, seed: int, where: str) -> Iterator[Record]:
    if source.kind == "reasoning_gym":
        return generate_stably(task, source.params, seed, where)
    weights: Mapping[str, float] = {str(kind): weight for kind, weight in source.pair_kinds.items()}
    return generate_graded(task, source.params, seed, source.emit or "pairs", weights, where)


def _units(rows: Iterable[tuple[str, Mapping[str, Any]]], source: SourceSection) -> list[Unit]:
    if source.format == "trl":
        units = _by_prompt(normalise(row, where) for where, row in rows)
    else:
        if source.emit == "demonstrations":
            raise UserError(f"format {source.format} gives no demonstrations", where=source.path, instead="write emit: pairs")
        units = adapt(rows, source.format, source.emit or "pairs", source.dimension)
    return require_some(units, source.path or "")


def _by_prompt(records: Iterable[Record]) -> list[Unit]:
    """Preference pairs of one prompt together, where the first of them is; every other record by itself."""
    units: list[Unit] = []
    pairs: dict[str, Unit] = {}
    for record in records:
        key = prompt_key(record) if "chosen" in record else None
        if key in pairs:
            pairs[key].append(record)
            continue
        units.append([record])
        if key is not None:
            pairs[key] = units[-1]
    return units


def read_jsonl(path: str | Path) -> list[Record]:
    """Normalised records of a JSONL file, in its order; empty lines are skipped.

    Raises:
        UserError: the file cannot be read, holds no record, or a line is broken (named as file:line).
    """
    return require_some([normalise(row, where) for where, row in read_rows(path, "jsonl")], path)


def read_parquet(path: str | Path) -> list[Record]:
    """Normalised records of a Parquet file, in its order. UserError as for `read_jsonl`, rows counted from 1."""
    return require_some([normalise(row, where) for where, row in read_rows(path, "parquet")], path)


def _hub_rows(source: SourceSection, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    assert source.path is not None
    try:
        dataset = datasets.load_dataset(source.path, source.subset, split=source.hub_split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load dataset '{source.path}' ({reason})", where=where) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{source.path}: row {number}", row
