"""Multiple choice: which option an answer names, and answers that name several."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.errors import UserError
from posttrain.reward.types import LevelScore, Sample
from posttrain.reward.verifiers import is_right, verify
from posttrain.reward.verifiers.choice import read_choice

CITIES = ["London", "Paris", "New York", "York"]


def verified(answer: str, expected: str = "B", metadata: Any = None) -> LevelScore:
    reference = {"verifier": "choice", "answer": expected}
    if metadata is not None:
        reference["metadata"] = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return verify(Sample([{"role": "user", "content": "Which is the capital of France?"}], answer, reference))


@pytest.mark.parametrize(
    ("answer", "place", "named"),
    [
        ("B", "letter", "B"),
        ("b", "letter", "B"),
        ("(B)", "letter", "B"),
        ("**B**", "letter", "B"),
        ("B.", "letter", "B"),
        ("B) Paris", "letter", "B"),
        ("Answer: B", "statement", "B"),
        ("Answer: b", "statement", "B"),
        ("Answer: (B)", "statement", "B"),
        ("answer:\nB", "statement", "B"),
        ("ANSWER = [B]", "statement", "B"),
        ("The answer is **B**.", "statement", "B"),
        ("The correct option is B, since it is the seat of government.", "statement", "B"),
        ("So the answer is A because it rains there", "statement", "A"),
        ("The answer is Paris.", "statement", "B"),
        ("Option A is wrong. (C) is wrong as well. Answer: B", "statement", "B"),
        ("I first thought the answer is B. But the correct answer is C.", "statement", "C"),
        ("Answer: A or D\nNo, wait.\nAnswer: B", "statement", "B"),
        ("The answer is B. The answer is not clear to all, though.", "statement", "B"),
        (r"\boxed{B}", "boxed", "B"),
        (r"The answer is A? No: $\boxed{\text{B}}$", "boxed", "B"),
        (r"\boxed{(B)}", "boxed", "B"),
        (r"\boxed{\mathbf{B}}", "boxed", "B"),
        (r"\boxed{paris}", "boxed", "B"),
        ("the best one is option C", "letter", "C"),
        ("I would go with choice D", "letter", "D"),
        ("Paris", "text", "B"),
        ("It is new york!", "text", "C"),
        ("York, I believe", "text", "D"),
    ],
)
def test_usual_ways_to_name_an_option_are_read(answer: str, place: str, named: str) -> None:
    assert read_choice(answer, CITIES) == (place, [named])


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("Answer: A or B", "AB"),
        ("Answer: A, B", "AB"),
        ("The answer is B. No, the answer is A or C.", "AC"),
        (r"\boxed{A} or \boxed{B}", "AB"),
        (r"\boxed{A, B}", "AB"),
        ("A. London\nB. Paris\nC. New York\nD. York", "ABCD"),
        ("(A) is wrong, so (B)", "AB"),
        ("London or Paris", "AB"),
        ("Answer: B) London", "AB"),
    ],
)
def test_an_answer_that_names_several_options_is_wrong_for_each(answer: str, named: str) -> None:
    for expected in named:
        level = verified(answer, expected, {"choices": CITIES})
        assert level.score == 0.0 and not is_right(level)
        assert level.evidence["read"] == list(named) and level.evidence["reason"] == "names several options"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I do not know",
        "Z",
        "Answer: A good choice would be hard to find",  # an article
        "Answer: I think so",
        "The answer is not B.",
        "The answer is not Paris.",
        "It is not Paris",
        "The answer is a bit unclear",
        "Abcd",
    ],
)
def test_an_answer_that_names_no_option_is_wrong(answer: str) -> None:
    level = verified(answer, "B", {"choices": CITIES})
    assert level.score == 0.0 and level.evidence["reason"] == "names no option" and level.evidence["read"] == []


def test_expected_answers_may_be_letters_or_texts() -> None:
    for expected in ("B", "(B)", "b", "Paris", " Paris "):
        level = verified("Answer: B", expected, {"choices": CITIES})
        assert is_right(level) and level.contribution == 1.0
        assert level.evidence == {"expected": "B", "read": ["B"], "place": "statement"}
    # Options that are letters themselves: the text decides what is expected.
    assert verified("(A)", "B", {"choices": ["B", "C"]}).score == 1.0


def test_without_choices_letters_are_read_alone() -> None:
    assert verified("The answer is B.").score == 1.0
    assert verified("The answer is C.").score == 0.0
    assert verified("Paris").evidence["reason"] == "names no option"


@given(
    st.integers(0, 3), st.integers(0, 3), st.sampled_from(["{}", "({})", "Answer: {}", r"\boxed{{{}}}", "The answer is ({})."])
)
def test_a_letter_is_right_exactly_where_it_is_the_expected_one(said: int, expected: int, form: str) -> None:
    answer = form.format("ABCD"[said])
    assert is_right(verified(answer, "ABCD"[expected], {"choices": CITIES})) is (said == expected)


@given(st.text(max_size=200))
def test_any_text_is_read_and_only_options_are_named(answer: str) -> None:
    place, named = read_choice(answer, CITIES)
    assert set(named) <= set("ABCD") and (place == "nowhere") is (not named)


@pytest.mark.parametrize(
    ("expected", "metadata", "says"),
    [
        ("E", {"choices": CITIES}, "'E' is no option; should be a letter from A to D, or the text"),
        ("Rome", {"choices": CITIES}, "'Rome' is no option"),
        ("Paris", None, "'Paris' is no option; should be a letter from A to Z"),
        ("x", {"choices": ["x", "x"]}, "text of several choices; give its letter"),
        ("A", {"choices": "London"}, "no list of texts"),
        ("A", {"choices": [1, 2]}, "no list of texts"),
        ("A", {"choices": ["x"] * 27}, "27 options"),
        ("A", "[1]", "metadata is no JSON object"),
        ("A", "{", "metadata is not JSON"),
    ],
)
def test_records_that_cannot_be_used_are_refused(expected: str, metadata: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        verified("A", expected, metadata)
