"""Answers to multiple-choice questions, given as a letter or as an option's text."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from posttrain.config.errors import UserError
from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers.verdict import required, settings, verdict

LETTERS = string.ascii_uppercase
_STATEMENT = 300  # characters of a statement that are read

# Commands that only change how a letter looks: \text{B}, \mathbf{B}.
_DRESS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}")
_STATED = re.compile(
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice|letter|one))\b[\s*_]*(?:(?:is|was|are)\b(?!\s+not\b)|[:=])[:\s*_]*",
    re.I,
)
# A letter by itself. "A" and "I" are words too, so what follows them must not read on like a sentence.
_LETTER = re.compile(
    r"(?<![\w\\'’])(?:([B-HJ-Z])(?![\w'’])|([AI])(?=\s*(?:$|[.,;:!?)\]}*_$/&]|[-–—]\s|\(|(?:or|and|because|since|as|is|due|with)\b)))",
    re.M,
)
_JOINED = re.compile(r"\W*(?:\b(?:or|and)\b)?\W*", re.I)
# "(B)", "option B", and "B." or "B)" at the start of a line.
_MENTIONED = re.compile(
    r"[(\[]\s*([A-Za-z])\s*[)\]]|\b(?:[Oo]ption|[Cc]hoice|OPTION|CHOICE)\s+[(\[*_]*([A-Z])\b|^[ \t*_#>-]*([A-Z])[*_]*(?:[.):]|$)",
    re.M,
)
_ALONE = re.compile(r"[\s(\[{*_$\"'`]*([A-Za-z])[\s)\]}*_$\"'`.,:;!]*")


class ChoiceVerifier:
    """Compares the option that the answer names with the expected one.

    `answer` of the record is a letter ("B", "(B)") or, where `metadata` lists the `choices`, an option's text. The answer is read
    at the first of these places that names anything: boxes (`\\boxed{B}`), the last of the statements ("Answer: B", "the answer
    is (B)", "the correct option is B") that names any, letters as options are written ("(B)", "option B", "B." before a line),
    and the options' texts. An answer that names several different options there is wrong: hedging must not pay.
    """

    name = "choice"

    def verify(self, sample: Sample) -> LevelScore:
        """Score 1 when the expected option and no other is named, else 0; evidence says what was read, and where.

        Raises:
            UserError: the record has no `answer`, or one that is none of its choices; `choices` is not a list of texts.
        """
        choices = _choices(sample)
        expected = _expected(required(sample, "answer"), choices)
        place, named = read_choice(sample.answer, choices)
        evidence = {"expected": expected, "read": named, "place": place}
        if not named:
            return verdict(0.0, {**evidence, "reason": "names no option"})
        if len(named) > 1:
            return verdict(0.0, {**evidence, "reason": "names several options"})
        return verdict(float(named == [expected]), evidence)


def read_choice(answer: str, choices: Sequence[str] = ()) -> tuple[str, list[str]]:
    """What an answer names.

    Args:
        answer: any text.
        choices: texts of the options in the order of their letters; none means that only letters can be read, of A to Z.

    Returns:
        The place ("boxed", "statement", "letter", "text", or "nowhere") and the different letters named there, sorted.
    """
    text = _DRESS.sub(r"\1", answer)
    allowed = LETTERS[: len(choices)] if choices else LETTERS
    # A statement ends with its line; where the line is empty ("Answer:\nB"), with the next one.
    statements = [text[match.end() : match.end() + _STATEMENT].split("\n", 1)[0] for match in _STATED.finditer(text)]
    places = (
        ("boxed", [_named(box, choices, allowed) for box in _BOXED.findall(text)]),
        # A later statement takes an earlier one back ("I thought the answer is B. But the answer is C.").
        ("statement", [named for statement in statements if (named := _named(statement, choices, allowed))][-1:]),
        ("letter", [_alone(text, allowed) or _mentioned(text, allowed)]),
        ("text", [_texts(text, choices)]),
    )
    for place, found in places:
        if letters := set().union(*found):
            return place, sorted(letters)
    return "nowhere", []


def _named(text: str, choices: Sequence[str], allowed: str) -> set[str]:
    """Options named at the beginning of a statement or in a box: letters joined by "or", "and", commas; else texts."""
    if letter := _alone(text, allowed):
        return letter
    letters: set[str] = set()
    position = 0
    while match := _LETTER.search(text, position):
        if not _JOINED.fullmatch(text, position, match.start()):
            break
        letters.add(match[1] or match[2])
        position = match.end()
    letters &= set(allowed)
    rest = _plain(text[position:])
    if letters:  # "B) London", where London is not B, names two options
        return letters | {LETTERS[i] for i, choice in enumerate(choices) if rest and _plain(choice) == rest}
    return _texts(text, choices)


def _alone(text: str, allowed: str) -> set[str]:
    match = _ALONE.fullmatch(text)
    return {match[1].upper()} & set(allowed) if match else set()


def _mentioned(text: str, allowed: str) -> set[str]:
    return {next(filter(None, match.groups())).upper() for match in _MENTIONED.finditer(text)} & set(allowed)


def _texts(text: str, choices: Sequence[str]) -> set[str]:
    """Options whose text occurs, whole words, case aside; not after "not", nor within a longer option's text."""
    rest = f" {_plain(text)} "
    found = set()
    for i in sorted(range(len(choices)), key=lambda i: -len(_plain(choices[i]))):
        words = _plain(choices[i])
        pattern = re.compile(rf"(?<!\w)(?<!not ){re.escape(words)}(?!\w)")
        if words and pattern.search(rest):
            found.add(LETTERS[i])
            rest = pattern.sub("\0", rest)
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,:;!?\"'`*_$()[]{}")


def _choices(sample: Sample) -> list[str]:
    choices = settings(sample).get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError("'choices' in metadata is no list of texts", instead='should be like {"choices": ["first", "second"]}')
    if len(choices) > len(LETTERS):
        raise UserError(f"'choices' in metadata has {len(choices)} options", instead=f"at most {len(LETTERS)} have letters")
    return choices


def _expected(answer: str, choices: Sequence[str]) -> str:
    """Letter of the right option. An option's text comes first: options may themselves be letters."""
    same = [LETTERS[i] for i, choice in enumerate(choices) if choice.strip() == answer.strip()]
    allowed = LETTERS[: len(choices)] if choices else LETTERS
    if letter := set(same) or _alone(answer, allowed):
        if len(letter) == 1:
            return letter.pop()
        raise UserError(f"the expected answer '{answer}' is the text of several choices", instead="give its letter")
    instead = f"should be a letter from A to {allowed[-1]}" + (", or the text of one of the choices" if choices else "")
    raise UserError(f"the expected answer '{answer[:80]}' is no option", instead=instead)
