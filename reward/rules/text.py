"""Words, sentences and paragraphs of an answer."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")
_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*_]*+(?=\s|$)|[。！？]+[」』”]*|\n\s*\n")
# A stop after these ends no sentence; single letters are initials.
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"“])(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|e\.g|i\.e|a\.m|p\.m|cf|fig|vol|al|approx|dept|est|inc|ltd|co|[a-z])\.$",
    re.I,
)
_LIST_NUMBER = re.compile(r"(?:^|\n)\s*\d+\.$")


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, as IFEval counts them: "don't" is two, a run of Chinese characters one."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Sentences by their end marks; a blank line ends one too. Stops of abbreviations, initials and list numbers do not.

    IFEval counts with nltk's trained splitter, so on odd text the two can differ by one.
    """
    found: list[str] = []
    begin = 0
    for match in _END.finditer(text):
        before = text[max(begin, match.start() - 20) : match.start() + 1]
        stop = match[0] == "."
        last = match.end() == len(text.rstrip())
        if stop and not last and (_ABBREVIATION.search(before) or _LIST_NUMBER.search(before)):
            continue
        found.append(text[begin : match.end()])
        begin = match.end()
    found.append(text[begin:])
    return [sentence.strip() for sentence in found if _WORD.search(sentence)]


def divided_paragraphs(text: str) -> list[str]:
    """Paragraphs between dividers `***`; an empty one before the first or after the last divider is none."""
    parts = _DIVIDER.split(text)
    if parts and not parts[0].strip():
        parts = parts[1:]
    if parts and not parts[-1].strip():
        parts = parts[:-1]
    return parts


def blank_line_paragraphs(text: str) -> list[str]:
    """Paragraphs between empty lines, as IFEval divides them: at two line ends with nothing between; empty ones stay."""
    return [part.strip() for part in text.split("\n\n")]
