"""Rules: every one on hand-made answers, properties of those that count, and the node that `check` makes."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.reward.rules import RULES, check, constraints_from_ifeval, gate_share, parse_constraints
from posttrain.reward.rules.rule import Rule
from posttrain.reward.rules.text import sentences
from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers.choice import read_choice

IFEVAL = {
    "keywords:existence",
    "keywords:frequency",
    "keywords:forbidden_words",
    "keywords:letter_frequency",
    "language:response_language",
    "length_constraints:number_paragraphs",
    "length_constraints:number_words",
    "length_constraints:number_sentences",
    "length_constraints:nth_paragraph_first_word",
    "detectable_content:postscript",
    "detectable_content:number_placeholders",
    "detectable_format:number_bullet_lists",
    "detectable_format:constrained_response",
    "detectable_format:number_highlighted_sections",
    "detectable_format:multiple_sections",
    "detectable_format:json_format",
    "detectable_format:title",
    "combination:two_responses",
    "combination:repeat_prompt",
    "startend:end_checker",
    "startend:quotation",
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "punctuation:no_comma",
}
OURS = {"length_constraints:number_characters", "format:regex", "repetition:ngram"}

# rule, parameters, answers that keep it, answers that do not
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["sea", "C++"]},
        ["The Sea, in c++", "seaside C++"],
        ["the sea", "c++", "C+ sea"],
    ),
    (
        "keywords:frequency",
        {"keyword": "sea ", "frequency": 2, "relation": "at least"},
        ["sea SEA", "Seaside by the sea, sea"],
        ["sea", "see see"],
    ),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, ["sea", "none"], ["sea sea"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["sea", "e.g."]},
        ["seaside", "overseas", "eg"],
        ["The Sea.", "sea", "animals, e.g. cats"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_frequency": 2, "let_relation": "at least"},
        ["quick, Quiet", "qq"],
        ["quick", "abc"],
    ),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "less than"}, ["Hey!"], ["Hey!!"]),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist ein kurzer Satz über das Wetter.", "Ich weiß es leider nicht."],
        ["This is a short sentence about the weather.", "42", "Ceci est une phrase courte."],
    ),
    ("language:response_language", {"language": "zh-cn"}, ["你好，世界。这是一个测试。"], ["これはテストです。", "Hello world"]),
    ("language:response_language", {"language": "is"}, ["Þetta er stuttur texti á íslensku um veðrið."], ["This is English."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "a *** b", "***\na\n***\nb\n***"],
        ["a", "a\n\nb", "a***b***c", "a *** *** b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one two three", "don't go"], ["one two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, ["one two three"], ["one two three four"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "more than"}, ["one two three four"], ["one two three"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "exactly"}, ["one two three"], ["one two", "a b c d"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two!", "Is it? Yes", "你好。世界！"],
        ["One", "Dr. Smith paid 3.50 to J. Doe, e.g. for tea.", "Wait."],
    ),
    (
        "length_constraints:number_characters",
        {"num_characters": 5, "relation": "at most"},
        ["12345", "  12345\n", "äöü"],
        ["123456"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "President"},
        ["One.\n\npresident, he was", 'One.\n\n\n"President" of it', "One.\n\nPresident,elect", "a\n \nb\n\npresident"],
        ["One.\n\nThe president", "president", "a\n\nb\n\npresident", "president\n\nb", "a\n \npresident", "a\n\n\n\npresident"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Text.\nP.S. More", "Text.\np. s. more"],
        ["Text. PS more", "Text", "chips. more"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Text.\n\nP.P.S. More", "P.P.S more"], ["P.S. More"]),
    ("detectable_content:postscript", {"postscript_marker": "Note:"}, ["x\nnote: y"], ["x\nnotes y"]),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["Dear [name], at [address]", "[a][b][c]"],
        ["Dear [name]", "[] []", "[a"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "Intro\n* a\nText\n- b", "---\n* a"],
        ["* a", "* a\n* b\n* c", "**bold**\n* a", "* a\n* b\n---", "1. a\n2. b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "  My answer is maybe. "],
        ["my answer is yes.", "Yes"],
    ),
    ("detectable_format:constrained_response", {"options": ["left", "right"]}, ["left"], ["My answer is yes."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** and *b*", "*a* **b** *c*"],
        ["*a*", "** ** *b*", "* a\n* b", "**a**"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 a SECTION2 b SECTION3"],
        ["SECTION 1\na", "Section 1\nSection 2", "SECTION A\nSECTION B"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": [1, 2]}\n```', "```\n[]\n```", "3", '```JSON {"a": 1}```'],
        ["{'a': 1}", 'Here: {"a": 1}', '{"a": 1', "```json\n```", "[" * 100_000],
    ),
    ("detectable_format:title", {}, ["<<On rain>>\nText", "Text <<a>>"], ["<<>>", "<< >>", "<title>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["One\n******\nTwo", "******One******Two"],
        ["One", "One******One", "One******Two******Three", "One************Two", "******"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "What is rain? "},
        ["What is rain? It is water.", "  what is rain?"],
        ["You ask: What is rain?", "Rain is water."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Any other questions?"},
        ["Text. Any other questions?", 'Text. "any other questions?" ', "Text. Any other questions?\n"],
        ["Any other questions? No.", "Text."],
    ),
    ("startend:quotation", {}, ['"Text"', ' "a" and "b" ', "“Text”"], ['"', '"Text', "'Text'", 'Text "']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["STOP NOW", "NASA and I", "WELL-KNOWN U.S. law"],
        ["STOP now", "Stop Now", "WELL-KNOWN", "12 34"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS A SHORT SENTENCE ABOUT RAIN.", "42 DAYS OF RAIN"],
        ["This is short.", "DAS IST EIN KURZER SATZ ÜBER DAS WETTER.", "42"],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this is a short sentence about rain."],
        ["This is short.", "das ist ein kurzer satz über das wetter.", "42"],
    ),
    ("punctuation:no_comma", {}, ["No commas; none."], ["One, two", ","]),
    (
        "repetition:ngram",
        {"max_share": 0.1},
        ["a b c", "the cat sat on the mat and the cat slept well", "x"],
        ["on and on and on and on and on", "A b c d a B c d"],
    ),
    ("repetition:ngram", {"max_share": 0.0, "n": 2}, ["a b c a"], ["a b c a b"]),
    ("format:regex", {"pattern": r"\d{4}-\d{2}"}, ["2024-01", " 2024-01\n"], ["on 2024-01", "2024-1"]),
    ("format:regex", {"pattern": r"\d{4}", "full": False}, ["in 2024"], ["in 24"]),
]


def checked(answer: str, *constraints: dict[str, Any]) -> LevelScore:
    level = check(Sample([{"role": "user", "content": "q"}], answer, {"constraints": json.dumps(constraints)}))
    assert level is not None
    return level


def kept(answer: str, name: str, **params: Any) -> bool:
    return checked(answer, {"rule": name, **params}).score == 1.0


def test_all_instructions_of_ifeval_and_ours_are_there_and_tested() -> None:
    assert set(RULES) == IFEVAL | OURS and len(IFEVAL) == 25
    assert {case[0] for case in CASES} == set(RULES)
    assert all(isinstance(rule, Rule) and rule.function.__doc__ for rule in RULES.values())


@pytest.mark.parametrize(("name", "params", "good", "bad"), CASES)
def test_each_rule_on_hand_made_answers(name: str, params: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert {answer: kept(answer, name, **params) for answer in good} == dict.fromkeys(good, True)
    assert {answer: kept(answer, name, **params) for answer in bad} == dict.fromkeys(bad, False)


@pytest.mark.parametrize(("name", "params"), [case[:2] for case in CASES])
@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_keeps_no_rule(name: str, params: dict[str, Any], answer: str) -> None:
    level = checked(answer, {"rule": name, **params})
    assert level.score == 0.0 and level.parts[0].evidence["reason"] == "the answer is empty"


@given(st.text(max_size=200), st.sampled_from(CASES))
def test_any_text_is_judged_and_the_same_each_time(answer: str, case: tuple[str, dict[str, Any], list[str], list[str]]) -> None:
    first, second = (checked(answer, {"rule": case[0], **case[1]}) for _ in range(2))
    assert first == second and first.score in (0.0, 1.0)
    assert json.loads(json.dumps(dict(first.parts[0].evidence))) == dict(first.parts[0].evidence)


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=30), st.integers(0, 31))
def test_relations_agree_with_counting(words: list[str], wanted: int) -> None:
    answer = " ".join(words)
    count = len(words)
    expected = {
        "at least": count >= wanted,
        "at most": count <= wanted,
        "less than": count < wanted,
        "more than": count > wanted,
        "exactly": count == wanted,
    }
    got = {name: kept(answer, "length_constraints:number_words", num_words=wanted, relation=name) for name in expected}
    assert got == expected
    letters = Counter(answer)["a"]
    assert kept(answer, "keywords:letter_frequency", letter="a", let_frequency=wanted, let_relation="at least") is (
        letters >= wanted
    )


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.integers(1, 5), st.floats(0, 1))
def test_repetition_agrees_with_a_count_of_runs(words: list[str], n: int, most: float) -> None:
    runs = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    repeats = sum(times - 1 for times in runs.values())
    share = repeats / sum(runs.values()) if runs else 0.0
    if abs(share - most) > 1e-12:  # 1 - a/b and (b-a)/b may round apart
        assert kept(" ".join(words), "repetition:ngram", n=n, max_share=most) is (share <= most)


@given(st.integers(1, 12), st.sampled_from([". ", "! ", "? ", "... ", '." ', "\n\n"]))
def test_sentences_are_counted(count: int, end: str) -> None:
    assert len(sentences(end.join(["The rain fell"] * count))) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("Mr. Smith met Dr. Jones at 5.30 p.m. in St. Ives.", 1),
        ("1. First.\n2. Second.", 2),
        ('He said "Stop." Then he went.', 2),
        ("Title\n\nBody text. More", 3),
        ("I say no. Then I go.", 2),
        ("See e.g. example.com, v1.2.3, etc. for more!", 1),
    ],
)
def test_stops_that_end_no_sentence_are_not_counted(text: str, count: int) -> None:
    assert len(sentences(text)) == count


def test_a_careless_pattern_ends_in_time() -> None:
    level = checked("a" * 40 + "!", {"rule": "format:regex", "pattern": r"(a|a)*b"})
    assert level.score == 0.0
    assert level.parts[0].evidence["reason"] in ("takes longer than 1 s to match", "does not match the pattern")


@pytest.mark.parametrize("text", [".", "\n", "*", "<", "[", "-", " ", "e.g. ", "\n ", '"', "a", "***", "(A) ", "P.S. ", "A-"])
def test_long_monotonous_answers_are_judged_quickly(text: str) -> None:
    # What a policy that has collapsed writes. A pattern that went back over it at every character would take minutes.
    answer = "x" + text * (60_000 // len(text)) + "x"
    began = time.process_time()
    for name, params, _, _ in CASES:
        checked(answer, {"rule": name, **params})
    read_choice(answer, ["x", "y"])
    read_choice(f"Answer: {answer} B", ["x", "y"])
    assert time.process_time() - began < 5


def test_the_node_has_a_part_for_every_constraint() -> None:
    level = checked("One, two", {"rule": "punctuation:no_comma", "gate": True}, {"rule": "detectable_format:title"}, WORDS)
    assert (level.name, level.weight, level.contribution) == ("rules", 0.0, 0.0)
    assert level.score == pytest.approx(1 / 3) and level.evidence == {"kept": 1, "of": 3}
    assert [(part.name, part.score) for part in level.parts] == [
        ("punctuation:no_comma", 0.0),
        ("detectable_format:title", 0.0),
        ("length_constraints:number_words", 1.0),
    ]
    assert all((part.weight, part.contribution) == (0.0, 0.0) for part in level.parts)
    assert level.parts[0].evidence == {"reason": "1 commas, should be exactly 0", "params": {}, "gate": True}
    assert level.parts[2].evidence["params"] == {"num_words": 2, "relation": "at least"}


WORDS = {"rule": "length_constraints:number_words", "num_words": 2, "relation": "at least"}
TITLE = {"rule": "detectable_format:title"}
COMMA = {"rule": "punctuation:no_comma"}


@pytest.mark.parametrize(
    ("constraints", "share"),
    [
        ([COMMA, WORDS], None),
        ([COMMA, TITLE], 0.0),
        ([TITLE, {"rule": "format:regex", "pattern": ".*"}], 0.5),
        ([TITLE | {"gate": False}], None),
        ([COMMA | {"gate": True}, WORDS | {"gate": True}, TITLE], 0.5),
        ([WORDS | {"gate": True}, TITLE], 1.0),
    ],
)
def test_the_gate_reads_marked_constraints_or_those_about_format(constraints: list[dict[str, Any]], share: float | None) -> None:
    assert gate_share(checked("One, two", *constraints)) == share


@pytest.mark.parametrize("reference", [{}, {"constraints": "[]"}, {"instruction_id_list": [], "kwargs": []}])
def test_a_record_without_constraints_has_no_node(reference: dict[str, Any]) -> None:
    assert check(Sample([], "text", reference)) is None


def test_records_in_ifevals_own_schema_are_taken() -> None:
    # As in the public data: every instruction's parameters, those of the others empty, whole numbers as floats.
    ids = ["punctuation:no_comma", "length_constraints:number_words", "detectable_format:number_highlighted_sections"]
    empty = dict.fromkeys(["num_words", "relation", "num_highlights", "keywords"])
    kwargs = [empty, {**empty, "num_words": 300.0, "relation": "at least"}, {**empty, "num_highlights": 3}]
    expected = [
        {"rule": ids[0]},
        {"rule": ids[1], "num_words": 300, "relation": "at least"},
        {"rule": ids[2], "num_highlights": 3},
    ]
    assert constraints_from_ifeval(ids, kwargs) == expected
    assert constraints_from_ifeval(ids[:1], [None]) == expected[:1]
    level = check(Sample([], "*a* *b* *c*", {"instruction_id_list": ids, "kwargs": json.dumps(kwargs)}))
    assert level is not None and [part.score for part in level.parts] == [1.0, 0.0, 1.0]
    with pytest.raises(UserError, match="2 entries, 'kwargs' has 1; should be as many"):
        constraints_from_ifeval(ids[:2], kwargs[:1])


@pytest.mark.parametrize(
    ("constraints", "says"),
    [
        ("{", "'constraints' is not JSON"),
        ("{}", "'constraints' is no list"),
        ("[1]", "names no rule"),
        ('[{"rule": "punctuation:no_coma"}]', "unknown rule 'punctuation:no_coma'; did you mean 'punctuation:no_comma'"),
        ('[{"rule": "punctuation:no_comma", "gate": 1}]', "'gate' is 1; should be true or false"),
        (
            '[{"rule": "length_constraints:number_words", "num_word": 3}]',
            "rule 'length_constraints:number_words': has no parameter 'num_word'; did you mean 'num_words'",
        ),
        (
            '[{"rule": "length_constraints:number_words", "num_words": 3}]',
            "needs the parameter 'relation'; it is one of at least",
        ),
        (
            '[{"rule": "length_constraints:number_words", "num_words": -1, "relation": "at least"}]',
            "'num_words' is -1; should be a whole",
        ),
        (
            '[{"rule": "length_constraints:number_words", "num_words": 3, "relation": "over"}]',
            "'relation' is 'over'; should be one",
        ),
        ('[{"rule": "keywords:existence", "keywords": "sea"}]', "'keywords' is 'sea'; should be a list of texts"),
        ('[{"rule": "repetition:ngram", "max_share": 2}]', "'max_share' is 2; should be a number from 0 to 1"),
        ('[{"rule": "format:regex", "pattern": "("}]', "'pattern' is no regular expression"),
        ('[{"rule": "language:response_language", "language": "german"}]', "'language' is 'german'"),
    ],
)
def test_bad_constraints_are_refused(constraints: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")) as error:
        check(Sample([], "text", {"constraints": constraints}))
    assert "\n" not in str(error.value)


def test_constraints_are_read_once_a_record() -> None:
    text = json.dumps([WORDS])
    assert parse_constraints(text) is parse_constraints(text)
