"""Every TRL format becomes the one conversational shape; everything else is named."""

import json
from typing import Any

import pytest

from posttrain.config.errors import UserError
from posttrain.data.formats import normalise, prompt_key

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "completion": "good"}, {"prompt": [USER], "completion": [GOOD]}),
        ({"prompt": [USER], "completion": [GOOD]}, {"prompt": [USER], "completion": [GOOD]}),
        ({"messages": [USER, GOOD]}, {"messages": [USER, GOOD]}),
        ({"text": "good"}, {"messages": [GOOD]}),
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
        (
            {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        ),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
        ({"prompt": "q"}, {"prompt": [USER]}),
        (
            {"prompt": [USER], "verifier": "exact", "answer": "4"},
            {"prompt": [USER], "verifier": "exact", "answer": "4"},
        ),
        # columns that no format knows, and columns without a value, are left out
        ({"prompt": "q", "completion": "good", "source": "web", "chosen": None}, {"prompt": [USER], "completion": [GOOD]}),
        # content in blocks, and the dialect's own role name
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "ai", "content": "good"}]},
            {"messages": [USER, GOOD]},
        ),
    ],
)
def test_formats_become_one_shape(record: dict[str, Any], expected: dict[str, Any]) -> None:
    assert normalise(record) == expected
    assert normalise(expected) == expected


def test_an_implicit_text_prompt_is_the_common_beginning_as_in_trl() -> None:
    from trl import extract_prompt

    record = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    theirs, ours = extract_prompt(record), normalise(record)
    assert {name: ours[name][0]["content"] for name in ours} == theirs


def test_metadata_given_as_an_object_becomes_json() -> None:
    record = normalise({"prompt": "q", "verifier": "x", "answer": "1", "metadata": {"a": [1]}})
    assert json.loads(record["metadata"]) == {"a": [1]}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "q", "reply": "a"}, "no known format (question, reply)"),
        ({"prompt": "q", "chosen": "a"}, "'chosen' without 'rejected'"),
        ({"completion": "a"}, "nearest is prompt-completion, which also needs prompt"),
        ({"rejected": "a"}, "'rejected' without 'chosen'"),
        ({}, "no known format (none)"),
        ({"prompt": "q", "completoin": "a"}, "did you mean 'completion'"),
        ({"promt": "q", "completion": "a"}, "did you mean 'prompt'"),
        ({"prompt": 3, "completion": "a"}, "'prompt' is a number"),
        ({"prompt": "q", "completion": {"role": "assistant"}}, "'completion' is an object"),
        ({"messages": ["hi"]}, "'messages[0]' is text"),
        ({"messages": [{"role": "user"}]}, "'messages[0]' has no 'content'"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "did you mean 'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, "'messages[0].content' is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a block that is not text"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [{**GOOD, "tool_calls": [{}]}]}, "tool_calls"),
        ({"prompt": "q", "completion": [USER]}, "does not end with an assistant message"),
        ({"prompt": [], "completion": "a"}, "prompt is empty"),
        ({"chosen": "same", "rejected": "same"}, "do not differ"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "do not differ"),
        ({"prompt": "q", "completion": "a", "label": True}, "unpaired preference"),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, "stepwise supervision"),
        ({"messages": [USER, GOOD], "tools": [{"name": "f"}]}, "column 'tools'"),
        ({"prompt": "q", "verifier": "exact", "answer": 4}, "'answer' is a number"),
    ],
)
def test_what_no_stage_can_use_is_refused_by_name(record: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        normalise(record, "data.jsonl:7")
    assert str(refused.value).startswith("data.jsonl:7: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_records_with_the_same_prompt_have_the_same_key() -> None:
    key = prompt_key(normalise({"prompt": "q"}))
    assert prompt_key(normalise({"messages": [USER, GOOD]})) == key
    assert prompt_key(normalise({"chosen": [USER, GOOD], "rejected": [USER, BAD]})) == key
    assert prompt_key(normalise({"prompt": "q2"})) != key
    assert prompt_key(normalise({"text": "one"})) != prompt_key(normalise({"text": "two"}))
