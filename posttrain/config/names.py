"""What to say when a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `name`, or None when nothing is like it (difflib ratio below `cutoff`)."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def suggest(name: str, known: Iterable[str], shown: int = 8) -> str:
    """`did you mean 'x'?` when a known name is near, else the known names, at most `shown` of them."""
    known = list(dict.fromkeys(known))
    if match := nearest(name, known):
        return f"did you mean '{match}'?"
    if not known:
        return "there are none"
    more = f" and {len(known) - shown} more" if len(known) > shown else ""
    return f"known: {', '.join(known[:shown])}{more}"
