"""Dotted overrides from the command line: `stages.sft_short.steps=20`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.config.schema import RunConfig, Section
from posttrain.config.tree import chosen, named_value, sections_of
from posttrain.config.unknown import suggest_key
from posttrain.config.yaml_files import parse_yaml


@dataclass(frozen=True)
class Override:
    """A value for one key.

    Attributes:
        text: as given.
        key: its parts.
        value: parsed as YAML.
    """

    text: str
    key: tuple[str, ...]
    value: Any


def parse_override(text: str, raw: dict[str, Any], file: str) -> Override:
    """Parse `KEY=VALUE` and see that the configuration has such a key.

    Args:
        text: the override.
        raw: the merged configuration it will be applied to.
        file: its file, for errors.

    Raises:
        UserError: no `=`, an empty part, broken YAML, an unknown key, or a key below something that is no section.
    """
    where = f"{file}, override {text}"
    name, equals, written = text.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        raise UserError("is not KEY=VALUE", where=where, instead="write for example stages.sft_short.steps=20")
    if not written.strip():
        raise UserError("has no value", where=where, instead=f"write {name}=null to clear it")
    if key == ("extends",):
        raise UserError("a file is extended in the file", where=where, instead="write `extends: other.yaml` there")
    value = parse_yaml(written, f"{file}, override {name}")
    _require_known(key, value, raw, where)
    return Override(text, key, value)


def _require_known(key: tuple[str, ...], value: Any, raw: Any, where: str) -> None:
    """Walk the schema and the configuration side by side down to the key."""
    sections: Mapping[str, type[Section]] = {"": RunConfig}
    for depth, part in enumerate(key):
        here, last = ".".join(key[: depth + 1]), depth == len(key) - 1
        if sections:
            annotation = _field(part, sections, where, here, raw)
            inner = named_value(annotation)
            raw = raw.get(part) if isinstance(raw, dict) else None
            sections = chosen(sections_of(annotation), raw)
            if last or sections:
                continue
            if inner is None:
                raise UserError(f"'{here}' has no keys below it", where=where, instead=f"write {here}=VALUE")
            values: Any = inner
        else:  # a name below a mapping
            sections = sections_of(values)
            known = raw if isinstance(raw, dict) else {}
            if sections and part not in known and not (last and isinstance(value, dict)):
                raise UserError(f"unknown key '{here}'", where=where, instead=suggest(part, known))
            raw = known.get(part)
            if last or values is Any:
                return
            if not sections:
                raise UserError(f"'{here}' has no keys below it", where=where, instead=f"write {here}=VALUE")
            sections = chosen(sections, raw)


def _field(part: str, sections: Mapping[str, type[Section]], where: str, here: str, raw: Any) -> Any:
    models: Iterable[type[Section]] = sections.values()
    for model in models:
        if part in model.model_fields:
            return model.model_fields[part].annotation
    raise UserError(f"unknown key '{here}'", where=where, instead=suggest_key(part, sections))
