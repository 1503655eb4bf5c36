"""The schema as a tree: what stands under a key, every option by its full name, and types in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from posttrain.config.schema import AnyStage, RunConfig, Section

PLACEHOLDER = "NAME"
"""Stands for the name that a user gives to a source or a stage."""

STAGE_KINDS: dict[str, type[Section]] = {
    get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(get_args(AnyStage)[0])
}
"""Section of each kind of stage."""


@dataclass(frozen=True)
class Option:
    """One key of the configuration.

    Attributes:
        key: full name, `stages.NAME.optim.learning_rate`.
        kinds: kinds of stage that have it; empty outside stages.
        field: its definition.
    """

    key: str
    kinds: tuple[str, ...]
    field: FieldInfo


def without_none(annotation: Any) -> Any:
    """The annotation without `Annotated` around it and without `None` as an alternative."""
    if get_origin(annotation) is Annotated:
        return without_none(get_args(annotation)[0])
    if get_origin(annotation) in (UnionType, Union):
        rest = [choice for choice in get_args(annotation) if choice is not NoneType]
        return without_none(rest[0]) if len(rest) == 1 else annotation
    return annotation


def sections_of(annotation: Any) -> dict[str, type[Section]]:
    """The section classes that a value of this type can be, by stage kind ("" outside stages); empty for an option."""
    annotation = without_none(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {"": annotation}
    if get_origin(annotation) in (UnionType, Union):
        models = [without_none(choice) for choice in get_args(annotation)]
        return {kind: model for kind, model in STAGE_KINDS.items() if model in models}
    return {}


def named_value(annotation: Any) -> Any | None:
    """The type of the values where a type is a mapping from names that the user chooses, else None."""
    annotation = without_none(annotation)
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def options() -> list[Option]:
    """Every option (no sections), in the order of the schema; one that several kinds of stage share stands once."""
    return [option for option in walk() if not _contains_sections(option.field.annotation)]


def walk() -> list[Option]:
    """Every key, sections included, each before what is below it."""
    found: dict[tuple[str, str], Option] = {}
    for key, kind, field in _walk(RunConfig, "", ""):
        # Keys of different kinds are one option when they mean the same; otherwise each meaning is listed.
        meaning = (key, f"{field.description}|{field.annotation}|{field.default!r}")
        before = found.get(meaning)
        kinds = (*(before.kinds if before else ()), *([kind] if kind else ()))
        found[meaning] = Option(key, kinds, before.field if before else field)
    return list(found.values())


def _walk(model: type[Section], prefix: str, kind: str) -> Iterator[tuple[str, str, FieldInfo]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key, kind, field
        value = named_value(field.annotation)
        below = f"{key}.{PLACEHOLDER}." if value is not None else f"{key}."
        for own_kind, section in sections_of(field.annotation if value is None else value).items():
            yield from _walk(section, below, own_kind or kind)


def _contains_sections(annotation: Any) -> bool:
    value = named_value(annotation)
    return bool(sections_of(annotation if value is None else value))


def find_field(key: Sequence[str | int], raw: Any) -> FieldInfo | None:
    """The definition of a key as written in a configuration; None for names the user chose, list items and unknown keys.

    Args:
        key: its parts.
        raw: the configuration as read, to learn the kinds of stages.
    """
    sections: Mapping[str, type[Section]] = {"": RunConfig}
    parts = list(key)
    field: FieldInfo | None = None
    while parts:
        name = str(parts.pop(0))
        fields = [section.model_fields[name] for section in sections.values() if name in section.model_fields]
        if not fields:
            return None
        field = fields[0]
        raw = raw.get(name) if isinstance(raw, dict) else None
        value = named_value(field.annotation)
        if value is not None:
            if not parts:
                return field
            raw = raw.get(parts.pop(0)) if isinstance(raw, dict) else None
            if not parts:
                return None
        sections = chosen(sections_of(field.annotation if value is None else value), raw)
    return field


def chosen(sections: Mapping[str, type[Section]], raw: Any) -> Mapping[str, type[Section]]:
    """Of the kinds of a stage the one that its `kind` names; all of them when it names none."""
    kind = raw.get("kind") if isinstance(raw, dict) else None
    return {kind: sections[kind]} if isinstance(kind, str) and kind in sections else sections


def in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What may be written for a type, for example `a whole number of at least 1, or null`."""
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        return in_words(inner, [*(item for entry in own for item in getattr(entry, "metadata", [entry])), *metadata])
    if get_origin(annotation) in (UnionType, Union) and NoneType in get_args(annotation):
        return f"{in_words(without_none(annotation), metadata)}, or null"
    if sections_of(annotation):
        return "a section with keys below it"
    value = named_value(annotation)
    if value is not None:
        return f"names, each with {in_words(value)}"
    origin = get_origin(annotation)
    if origin is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if origin is list:
        return f"a list, each item {in_words(get_args(annotation)[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return f"{words.get(annotation, 'any value')}{_limits(metadata)}"


def _limits(metadata: Sequence[Any]) -> str:
    limits = []
    for item in metadata:
        match item:
            case annotated_types.Ge(ge=bound):
                limits.append(f"of at least {bound}")
            case annotated_types.Gt(gt=bound):
                limits.append(f"above {bound}")
            case annotated_types.Le(le=bound):
                limits.append(f"at most {bound}")
            case annotated_types.Lt(lt=bound):
                limits.append(f"below {bound}")
            case _ if getattr(item, "pattern", None):
                limits.append("of letters, digits, '.', '_' and '-', starting with a letter or digit")
    return f" {' and '.join(limits)}" if limits else ""
