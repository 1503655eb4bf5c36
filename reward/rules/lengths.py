"""Rules about length (IFEval's category "length_constraints", and characters)."""

from __future__ import annotations

import re

from posttrain.reward.rules.rule import Outcome, Relation, compare, rule
from posttrain.reward.rules.text import blank_line_paragraphs, divided_paragraphs, sentences, words

_FIRST_WORD = re.compile(r"'*\"*([^\s.,?!'\"]*)")  # IFEval's: up to the first of its marks, quotes before it aside


@rule("length_constraints:number_words")
def number_words(answer: str, *, num_words: int, relation: Relation) -> Outcome:
    """So many words."""
    return compare(len(words(answer)), relation, num_words, "words")


@rule("length_constraints:number_sentences")
def number_sentences(answer: str, *, num_sentences: int, relation: Relation) -> Outcome:
    """So many sentences."""
    return compare(len(sentences(answer)), relation, num_sentences, "sentences")


@rule("length_constraints:number_characters")
def number_characters(answer: str, *, num_characters: int, relation: Relation) -> Outcome:
    """So many characters, white space around the answer aside. Ours: a length that needs no tokenizer."""
    return compare(len(answer.strip()), relation, num_characters, "characters")


@rule("length_constraints:number_paragraphs")
def number_paragraphs(answer: str, *, num_paragraphs: int) -> Outcome:
    """Exactly so many paragraphs, divided by `***`, none of them empty."""
    paragraphs = divided_paragraphs(answer)
    if not all(paragraph.strip() for paragraph in paragraphs):
        return Outcome(False, "an empty paragraph between dividers")
    return compare(len(paragraphs), "exactly", num_paragraphs, "paragraphs")


@rule("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> Outcome:
    """Exactly so many paragraphs, divided by empty lines, and the n-th (from 1) begins with a word; case and marks aside.

    As in IFEval empty paragraphs are not counted, but take a place: in "a", four line ends and "b", the second is empty.
    """
    paragraphs = blank_line_paragraphs(answer)
    filled = sum(1 for paragraph in paragraphs if paragraph)
    count = compare(filled, "exactly", num_paragraphs, "paragraphs")
    if not count.kept or not 1 <= nth_paragraph <= filled or not paragraphs[nth_paragraph - 1]:
        return Outcome(False, count.reason if not count.kept else f"there is no paragraph {nth_paragraph}")
    match = _FIRST_WORD.match(paragraphs[nth_paragraph - 1])
    found = match[1] if match else ""
    return Outcome(found.lower() == first_word.strip().lower(), f"paragraph {nth_paragraph} begins with '{found}'")
