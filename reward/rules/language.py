"""Rules about language and letter case (IFEval's categories "language" and "change_case").

Languages are recognised by py3langid (naive Bayes on byte n-grams): its model comes with the package and always says the same.
"""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from typing import Any

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.reward.rules.rule import Outcome, Relation, compare, rule

_CAPITAL_WORD = re.compile(r"\w+(?:[-'’.]\w+)*")
_LETTER = re.compile(r"[^\W\d_]")
# Short text is easily taken for a rare neighbour of its language, so rare ones are left out unless they are asked for.
_COMMON = frozenset(
    "af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro ru sk sl "
    "so sq sv sw ta te th tl tr uk ur vi zh".split()
)
_READ = 20_000  # characters that are looked at; more would not change the language


@rule("language:response_language")
def response_language(answer: str, *, language: str) -> Outcome:
    """The answer is in a language, given by its code ("de"). Text without letters is in none."""
    wanted = language.lower().partition("-")[0]  # "zh-cn"
    if wanted not in _COMMON and wanted not in _known():
        raise UserError(
            f"'language' is {language!r}", where="rule 'language:response_language'", instead=suggest(wanted, _known())
        )
    found = detect(answer, wanted)
    return Outcome(found == wanted, f"is in '{found}', should be '{wanted}'" if found else "has no letters")


@rule("change_case:english_capital")
def english_capital(answer: str) -> Outcome:
    """English, and no small letter."""
    return _english(answer, answer.isupper(), "has small letters")


@rule("change_case:english_lowercase")
def english_lowercase(answer: str) -> Outcome:
    """English, and no capital letter."""
    return _english(answer, answer.islower(), "has capital letters")


@rule("change_case:capital_word_frequency")
def capital_word_frequency(answer: str, *, capital_frequency: int, capital_relation: Relation) -> Outcome:
    """So many words in capitals alone; "I" and "A" are such words, one with hyphens is one word."""
    found = sum(word.isupper() for word in _CAPITAL_WORD.findall(answer))
    return compare(found, capital_relation, capital_frequency, "words in capitals")


def detect(text: str, also: str = "en") -> str | None:
    """Code (ISO 639) of the most likely of the 54 common languages and `also`; None for text without letters."""
    if not _LETTER.search(text[:_READ]):
        return None
    return str(_identifier(also if also not in _COMMON else "").classify(text[:_READ])[0])


def _english(answer: str, right_case: bool, otherwise: str) -> Outcome:
    if not right_case:
        return Outcome(False, otherwise if _LETTER.search(answer) else "has no letters")
    found = detect(answer)
    return Outcome(found == "en", f"is in '{found}', should be 'en'")


def _known() -> list[str]:
    """Every language of the model; "zxx" is its name for what is no language."""
    return sorted({*_model().labels} - {"zxx"})


@lru_cache(maxsize=32)
def _identifier(also: str) -> Any:
    identifier = copy.copy(_model())  # shares the tables
    identifier.set_languages(_COMMON | {also} - {""})
    return identifier


@lru_cache(maxsize=1)
def _model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # a quarter of a second, and 40 MB

    return LanguageIdentifier.from_model_file(MODEL_FILE)
