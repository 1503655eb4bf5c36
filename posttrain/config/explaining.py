"""`posttrain explain KEY`: what an option means, what may be written, its default, and where the default comes from."""

from __future__ import annotations

import re

from pydantic_core import PydanticUndefined

from posttrain.config.errors import UserError
from posttrain.config.messages import show
from posttrain.config.names import nearest
from posttrain.config.schema import Section
from posttrain.config.tree import PLACEHOLDER, STAGE_KINDS, Option, in_words, named_value, sections_of, walk

_SOURCE = re.compile(r"\(([^()]*(?:paper|MiniMax-M1|TRL|GRPO)[^()]*)\)")
_OURS = "chosen for this project"


def explain(key: str) -> str:
    """Text about an option or a section, several lines.

    Args:
        key: the full name (`stages.NAME.steps`, any name or kind of stage at NAME) or its end (`learning_rate`,
            `optim.learning_rate`); an end that several options share explains all of them.

    Raises:
        UserError: no such option, with the nearest one.
    """
    found = _find(key)
    if not found:
        raise UserError("unknown option", where=key or "''", instead=_suggestion(key))
    return "\n\n".join(_text(option) for option in found)


def _find(key: str) -> list[Option]:
    everything = walk()
    parts = key.split(".")
    kind = parts[1] if len(parts) > 1 and parts[0] == "stages" and parts[1] in STAGE_KINDS else None
    if len(parts) > 1 and parts[0] in ("stages", "sources"):
        parts[1] = PLACEHOLDER
    if parts in (["stages", PLACEHOLDER], ["sources", PLACEHOLDER]):
        return [option for option in everything if option.key == parts[0]]
    full = ".".join(parts)
    exact = [option for option in everything if option.key == full and (kind is None or kind in option.kinds)]
    if exact:
        return exact
    # Below a mapping whose names the user chooses, such as stages.NAME.data.addition/train.
    mappings = [option for option in everything if named_value(option.field.annotation) is not None]
    below = [option for option in mappings if not _is_section(option) and full.startswith(f"{option.key}.")]
    return below or [option for option in everything if option.key.endswith(f".{key}")]


def _suggestion(key: str) -> str:
    names = [option.key for option in walk()]
    ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    parts = key.split(".")
    if len(parts) > 1 and parts[0] in ("stages", "sources"):
        parts[1] = PLACEHOLDER
    match = nearest(parts[-1], ends)
    inside = [name for name in names if name.rsplit(".", 1)[-1] == match]
    full = nearest(".".join(parts), inside, cutoff=0.0) if match else nearest(".".join(parts), names)
    return f"did you mean '{full}'?" if full else "write for example stages.NAME.steps"


def _is_section(option: Option) -> bool:
    value = named_value(option.field.annotation)
    return bool(sections_of(option.field.annotation if value is None else value))


def _text(option: Option) -> str:
    field = option.field
    kinds = f"  (stages of kind {', '.join(option.kinds)})" if option.kinds and set(option.kinds) != set(STAGE_KINDS) else ""
    lines = [f"{option.key}{kinds}", f"  {field.description}"]
    if _is_section(option):
        return "\n".join([*lines, *_keys_below(option)])
    lines += [f"  write:   {in_words(field.annotation, field.metadata)}", f"  default: {_default(option)}"]
    if not field.is_required():
        source = _SOURCE.search(field.description or "")
        lines.append(f"  source:  {source.group(1) if source else _OURS}")
    return "\n".join(lines)


def _default(option: Option) -> str:
    field = option.field
    if field.is_required():
        return "none, must be given"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    return show(value.model_dump() if isinstance(value, Section) else value)


def _keys_below(option: Option) -> list[str]:
    prefix = f"{option.key}.{PLACEHOLDER}." if named_value(option.field.annotation) is not None else f"{option.key}."
    below = [other for other in walk() if other.key.startswith(prefix) and "." not in other.key[len(prefix) :]]
    own = [other for other in below if not option.kinds or set(other.kinds) & set(option.kinds)]
    names = dict.fromkeys(other.key for other in own)
    return ["  keys:", *(f"    {name}" for name in names)]
