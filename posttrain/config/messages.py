"""One line for people from pydantic's errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.config.origins import Origins
from posttrain.config.schema import RunConfig, Section
from posttrain.config.tree import STAGE_KINDS, chosen, find_field, in_words, named_value, sections_of, without_none
from posttrain.config.unknown import suggest_key

Loc = tuple[str | int, ...]


def to_user_error(error: ValidationError, raw: Any, origins: Origins) -> UserError:
    """The most telling of pydantic's errors as a UserError: a misspelt key before the required key that it should have been.

    Args:
        error: from validating `raw` as a RunConfig.
        raw: the configuration as read.
        origins: which file wrote which key.
    """
    details = sorted(error.errors(include_url=False), key=lambda item: _RANK.get(item["type"], 1))[0]
    loc = _without_tag(details["loc"])
    what, instead = _explain(details, loc, raw)
    return UserError(what, where=origins.where([str(part) for part in loc if part != "[key]"]), instead=instead)


_RANK = {"union_tag_invalid": -1, "extra_forbidden": 0, "missing": 2, "union_tag_not_found": 2}


def _without_tag(loc: Loc) -> Loc:
    """Pydantic puts the kind of a stage behind its name; a person did not write it there."""
    return loc[:2] + loc[3:] if len(loc) > 2 and loc[0] == "stages" and loc[2] in STAGE_KINDS else loc


def _explain(details: ErrorDetails, loc: Loc, raw: Any) -> tuple[str, str]:
    """What is wrong and what to write instead."""
    kind, value, name = details["type"], details["input"], str(loc[-1])
    if kind == "extra_forbidden":
        return f"unknown key '{name}' (value {show(value)})", suggest_key(name, _sections_at(loc[:-1], raw))
    field = find_field(loc, raw)
    words = in_words(field.annotation, field.metadata) if field else _words_of_item(loc, raw)
    if kind == "missing":
        return f"required key '{name}' is missing", f"add {name}: {words}"
    if kind == "union_tag_not_found":
        return f"required key 'kind' is missing (stage {show(value)})", f"add kind: one of {', '.join(STAGE_KINDS)}"
    if kind == "union_tag_invalid":
        tag = details["ctx"]["tag"]
        return f"unknown kind '{tag}'", f"{suggest(str(tag), STAGE_KINDS)} write one of {', '.join(STAGE_KINDS)}"
    if kind == "literal_error" and field is not None:
        choices = [str(choice) for choice in get_args(without_none(field.annotation))]
        near = suggest(str(value), choices)
        return f"unknown value {show(value)}", f"{near} write {words}" if near.startswith("did") else f"write {words}"
    if kind == "too_short":
        return f"{show(value)} is empty", f"write at least one: {words}"
    if kind == "string_type" and isinstance(value, int | float):
        return f"got {show(value)}, which is not text", f'put it in quotes: {name}: "{show(value)}"'
    bad = "is out of range" if kind.startswith(("greater", "less", "finite")) else "does not fit"
    return f"{show(value)} {bad}", f"write {words}"


def _words_of_item(loc: Loc, raw: Any) -> str:
    """The type of an entry of a mapping or a list, from the field around it."""
    around = find_field(loc[:-1], raw)
    if around is None:
        return "another value"
    inner = named_value(around.annotation)
    items = [inner] if inner is not None else get_args(without_none(around.annotation))
    return in_words(items[0])


def _sections_at(loc: Sequence[str | int], raw: Any) -> Mapping[str, type[Section]]:
    """The section classes that the value at `loc` can be."""
    sections: Mapping[str, type[Section]] = {"": RunConfig}
    values: Any = None
    for part in loc:
        raw = raw.get(part) if isinstance(raw, dict) else None
        if values is not None:
            annotation, values = values, None
        else:
            annotation = next(
                model.model_fields[str(part)].annotation for model in sections.values() if part in model.model_fields
            )
            values = named_value(annotation)
        sections = chosen(sections_of(annotation), raw)
    return sections


def show(value: Any) -> str:
    """A value as it would be written, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
