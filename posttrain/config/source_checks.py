"""Options of sources that cannot work together. Each check raises for the first that it finds."""

from __future__ import annotations

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.config.origins import Origins
from posttrain.config.schema import RunConfig, SourceSection
from posttrain.config.tasks import WORKED_TASKS, check_settings, check_task

GENERATED_KINDS = ("reasoning_gym", "graded_pairs")
"""Kinds of sources that make their records."""

GRADED_FORMATS = ("helpsteer2", "ultrafeedback")
"""Formats that grade every answer."""


def check_sources(config: RunConfig, at: Origins) -> None:
    """See that the options of every source fit together.

    Raises:
        UserError: the first that cannot work.
    """
    for name, source in config.sources.items():
        _check_source(name, source, at)
    _check_disjoint(config, at)


def _check_source(name: str, source: SourceSection, at: Origins) -> None:
    key = f"sources.{name}"
    generated = source.kind in GENERATED_KINDS
    if generated and source.task is None:
        raise UserError(
            f"a source of kind {source.kind} needs a task", where=at.where(f"{key}.task"), instead="add task: chain_sum"
        )
    if not generated and source.path is None:
        example = "a dataset's name" if source.kind == "huggingface" else f"data/train.{source.kind}"
        raise UserError(
            f"a source of kind {source.kind} needs a path", where=at.where(f"{key}.path"), instead=f"add path: {example}"
        )
    _refuse_meaningless_for_source(source, key, at)
    if generated and not source.splits:
        raise UserError(
            "a generator has no end", where=at.where(f"{key}.splits"), instead="name its splits: splits: {train: 1000}"
        )
    for split, size in source.splits.items():
        if size < 1:
            raise UserError(
                f"{size} is out of range", where=at.where([*key.split("."), "splits", split]), instead="write at least 1"
            )
    if source.task is not None:
        check_task(source.task, at.where(f"{key}.task"))
        check_settings(source.task, source.params, at.where(f"{key}.params"))
    _check_preferences(source, key, at)


def _refuse_meaningless_for_source(source: SourceSection, key: str, at: Origins) -> None:
    """Options of other kinds, at another value than their default: a written-out config names them all."""
    generated = source.kind in GENERATED_KINDS
    foreign = ("path", "subset", "format", "dimension") if generated else ("task", "params", "pair_kinds")
    if source.kind == "reasoning_gym":
        foreign = (*foreign, "emit", "pair_kinds")
    for option in foreign:
        value = getattr(source, option)
        if value != SourceSection.model_fields[option].get_default(call_default_factory=True):
            other = "graded_pairs" if option in ("emit", "pair_kinds") else "jsonl" if generated else "reasoning_gym"
            raise UserError(
                f"'{option}' means nothing for kind {source.kind} (value {value!r})",
                where=at.where(f"{key}.{option}"),
                instead=f"take it out, or write kind: {other}",
            )


def _check_preferences(source: SourceSection, key: str, at: Origins) -> None:
    """Graded pairs and published formats: tasks that can be worked, and options that fit together."""
    graded = source.kind == "graded_pairs"
    if graded and source.task not in WORKED_TASKS:
        raise UserError(
            f"no steps are known of task '{source.task}'",
            where=at.where(f"{key}.task"),
            instead=f"write one of {', '.join(WORKED_TASKS)}",
        )
    if graded and not any(source.pair_kinds.values()):
        raise UserError("all weights are 0", where=at.where(f"{key}.pair_kinds"), instead="write pair_kinds: {contrastive: 1.0}")
    if not graded and source.format == "trl":
        for option in ("emit", "dimension"):
            if (value := getattr(source, option)) is not None:
                raise UserError(
                    f"'{option}' means nothing for format trl (value {value!r})",
                    where=at.where(f"{key}.{option}"),
                    instead="take it out: the records say what they are",
                )
        return
    if not graded and (source.emit == "demonstrations" or source.emit == "grades" and source.format not in GRADED_FORMATS):
        raise UserError(
            f"format {source.format} gives no {source.emit}",
            where=at.where(f"{key}.emit"),
            instead="write pairs" + (" or grades" if source.format in GRADED_FORMATS else ""),
        )
    if source.shots > 1 and not (graded and source.emit == "demonstrations"):
        raise UserError(
            f"{source.emit or 'pairs'} cannot be joined to conversations of {source.shots} turns",
            where=at.where(f"{key}.shots"),
            instead="write 1" + (", or emit: demonstrations" if graded else ""),
        )


def _check_disjoint(config: RunConfig, at: Origins) -> None:
    """Only earlier sources may be named, so that no two leave out each other."""
    for number, (name, source) in enumerate(config.sources.items()):
        earlier = list(config.sources)[:number]
        for other in source.disjoint_from:
            if other not in earlier:
                raise UserError(
                    f"'{other}' is not a source above '{name}'",
                    where=at.where(f"sources.{name}.disjoint_from"),
                    instead=suggest(other, earlier) if earlier else "move it below the source it leaves out",
                )
