"""Rules about form (IFEval's category "detectable_format", and patterns of one's own). They close the format gate."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

import regex

from posttrain.config.errors import UserError
from posttrain.reward.rules.rule import Outcome, compare, rule

IFEVAL_OPTIONS = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
"""What IFEval's `constrained_response` asks for; its records do not carry the options."""

# As IFEval has them: a line of dashes counts, a line that begins with two asterisks does not.
_BULLETS = (re.compile(r"^[^\S\n]*\*[^*].*$", re.M), re.compile(r"^[^\S\n]*-.*$", re.M))
_HIGHLIGHT = re.compile(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*")
_TITLE = re.compile(r"<<([^\n<>]+)>>")
_FENCE = re.compile(r"```(?:json)?", re.I)
_PATTERN_SECONDS = 1.0


@rule("detectable_format:number_bullet_lists")
def number_bullet_lists(answer: str, *, num_bullets: int) -> Outcome:
    """Exactly so many lines that begin with `*` or `-`."""
    return compare(sum(len(bullet.findall(answer)) for bullet in _BULLETS), "exactly", num_bullets, "bullet points")


@rule("detectable_format:constrained_response")
def constrained_response(answer: str, *, options: list[str] = IFEVAL_OPTIONS) -> Outcome:  # noqa: B006  (never changed)
    """One of the options occurs, word for word."""
    found = next((option for option in options if option in answer), None)
    return Outcome(found is not None, "names none of the options" if found is None else f"says '{found}'")


@rule("detectable_format:number_highlighted_sections")
def number_highlighted_sections(answer: str, *, num_highlights: int) -> Outcome:
    """At least so many passages in `*...*` or `**...**`."""
    found = sum(1 for match in _HIGHLIGHT.finditer(answer) if (match[1] or match[2]).strip())
    return compare(found, "at least", num_highlights, "highlighted passages")


@rule("detectable_format:multiple_sections")
def multiple_sections(answer: str, *, section_spliter: str, num_sections: int) -> Outcome:
    """At least so many sections, each begun by the word and a number ("SECTION 1"). The parameter's spelling is IFEval's."""
    found = len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s?\d+", answer))
    return compare(found, "at least", num_sections, "sections")


@rule("detectable_format:json_format")
def json_format(answer: str) -> Outcome:
    """The whole answer is JSON, a fence of backticks around it allowed."""
    text = answer.strip()
    if fence := _FENCE.match(text):
        text = text[fence.end() :].removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return Outcome(False, f"is no JSON ({error})"[:120])
    return Outcome(True, "is JSON")


@rule("detectable_format:title")
def title(answer: str) -> Outcome:
    """A title in double angular brackets, `<<title>>`."""
    found = any(match.strip() for match in _TITLE.findall(answer))
    return Outcome(found, "has a title" if found else "has no <<title>>")


@rule("format:regex")
def matches(answer: str, *, pattern: str, full: bool = True) -> Outcome:
    """The answer, white space around it aside, matches a regular expression as a whole, or with `full` false somewhere.

    A match that takes longer than a second counts as none: answers can be made to trip a careless pattern.
    """
    compiled = _compiled(pattern)
    find = compiled.fullmatch if full else compiled.search
    try:
        found = find(answer.strip(), timeout=_PATTERN_SECONDS) is not None
    except TimeoutError:
        return Outcome(False, f"takes longer than {_PATTERN_SECONDS:g} s to match")
    return Outcome(found, "matches" if found else "does not match the pattern")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"'pattern' is no regular expression ({error})", where="rule 'format:regex'") from error
