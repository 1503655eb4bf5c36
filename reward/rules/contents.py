"""Rules about parts of an answer (IFEval's "detectable_content", "combination", "startend", "punctuation"), and repetition."""

from __future__ import annotations

import re

from posttrain.reward.rules.rule import Outcome, compare, rule
from posttrain.reward.rules.text import words

_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
_RESPONSES = "******"


@rule("detectable_content:postscript")
def postscript(answer: str, *, postscript_marker: str) -> Outcome:
    """A postscript, begun by a marker ("P.S."); case and a space within the marker aside."""
    marker = postscript_marker.strip()
    pattern = _POSTSCRIPTS.get(marker.upper(), re.escape(marker))
    found = re.search(rf"(?<!\w){pattern}", answer, re.I) is not None
    return Outcome(found, f"has {'a' if found else 'no'} postscript '{marker}'")


@rule("detectable_content:number_placeholders")
def number_placeholders(answer: str, *, num_placeholders: int) -> Outcome:
    """At least so many placeholders in square brackets, `[address]`."""
    return compare(len(_PLACEHOLDER.findall(answer)), "at least", num_placeholders, "placeholders")


@rule("combination:two_responses")
def two_responses(answer: str) -> Outcome:
    """Two different responses, divided by six asterisks."""
    parts = [part.strip() for part in answer.split(_RESPONSES)]
    if parts and not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    if len(parts) != 2 or not all(parts):
        return Outcome(False, f"{len([part for part in parts if part])} responses, should be 2")
    return Outcome(parts[0] != parts[1], "two different responses" if parts[0] != parts[1] else "the same response twice")


@rule("combination:repeat_prompt")
def repeat_prompt(answer: str, *, prompt_to_repeat: str) -> Outcome:
    """The answer begins with a given text, word for word, case aside."""
    kept = answer.strip().lower().startswith(prompt_to_repeat.strip().lower())
    return Outcome(kept, "begins with the request" if kept else "does not begin with the request")


@rule("startend:end_checker")
def end_checker(answer: str, *, end_phrase: str) -> Outcome:
    """The answer ends with a phrase, quotation marks around the answer and case aside."""
    kept = answer.strip().strip('"').rstrip().lower().endswith(end_phrase.strip().lower())
    return Outcome(kept, f"ends {'' if kept else 'not '}with '{end_phrase.strip()}'")


@rule("startend:quotation")
def quotation(answer: str) -> Outcome:
    """The whole answer stands in double quotation marks."""
    text = answer.strip()
    kept = len(text) > 1 and text[0] in '"“' and text[-1] in '"”'
    return Outcome(kept, "is in quotation marks" if kept else "is not in quotation marks")


@rule("punctuation:no_comma")
def no_comma(answer: str) -> Outcome:
    """No comma."""
    return compare(answer.count(","), "exactly", 0, "commas")


@rule("repetition:ngram")
def ngram_repetition(answer: str, *, max_share: float, n: int = 4) -> Outcome:
    """At most this share of the runs of `n` words are repeats of an earlier one, case aside. Ours.

    The share is 1 - different runs / runs; an answer shorter than `n` words has none.
    """
    found = [word.lower() for word in words(answer)]
    size = max(n, 1)
    runs = [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]
    share = 1 - len(set(runs)) / len(runs) if runs else 0.0
    return Outcome(share <= max_share, f"{share:.3f} of the runs of {size} words are repeats, should be at most {max_share:g}")
