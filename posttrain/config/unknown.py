"""What to write instead of an unknown key."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.config.names import nearest, suggest
from posttrain.config.schema import RunConfig, Section
from posttrain.config.tree import STAGE_KINDS, options, sections_of


def suggest_key(name: str, sections: Mapping[str, type[Section]]) -> str:
    """What was probably meant by an unknown key.

    In this order: the same name one section deeper, the same name in stages of another kind, the nearest name of this
    section, the same name elsewhere, the names of this section.

    Args:
        name: the unknown key.
        sections: the section it was written in; several when the kind of a stage is not known.
    """
    known = list(dict.fromkeys(field for section in sections.values() for field in section.model_fields))
    if RunConfig in sections.values():
        known.append("extends")
    for section in sections.values():
        for outer, field in section.model_fields.items():
            if any(name in inner.model_fields for inner in sections_of(field.annotation).values()):
                return f"did you mean '{outer}.{name}'?"
    if any(section in STAGE_KINDS.values() for section in sections.values()):
        kinds = [kind for kind, section in STAGE_KINDS.items() if name in section.model_fields]
        if kinds:
            return f"'{name}' is a key of stages of kind {' and '.join(kinds)}; take it out"
    if match := nearest(name, known):
        return f"did you mean '{match}'?"
    elsewhere = [option.key for option in options() if option.key.rsplit(".", 1)[-1] == name]
    return f"did you mean '{elsewhere[0]}'?" if elsewhere else suggest(name, known, shown=12)
