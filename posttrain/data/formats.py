"""TRL's record formats, conversational or plain, turned into one shape.

A normalised record is conversational: `prompt` (messages) with any of `completion`, or `chosen` and `rejected` (messages);
or `messages` alone (language modelling). What says how answers are scored (`verifier`, `answer`, `metadata`, `constraints`,
`domain`) is text and stays. A pair may have `margins`: by how much the better answer leads in each dimension, in [0, 1], 0 where
both are equal, and a `pair_kind`, its maker's note of what sets the answers apart ("adversarial:longer"). An answer may have
`grades` by dimension, in [0, 1]. Objects are taken as JSON text too.
A message is `{"role": ..., "content": text}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.config.dimensions import TARGETS
from posttrain.config.errors import UserError
from posttrain.config.names import nearest, suggest

Message = dict[str, str]
Record = dict[str, Any]

FORMATS: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "preference with implicit prompt": ("chosen", "rejected"),
    "prompt-completion": ("prompt", "completion"),
    "language modelling (messages)": ("messages",),
    "language modelling (text)": ("text",),
    "prompt-only": ("prompt",),
}
"""Fields of each format; the first whose fields are all present is the record's."""

VERIFIER_FIELDS = ("verifier", "answer", "metadata", "constraints", "domain")
LABEL_FIELDS = ("margins", "grades")
PAIR_NOTE = "pair_kind"
ROLES = ("system", "user", "assistant", "tool")

_KNOWN_FIELDS = tuple(
    dict.fromkeys([field for fields in FORMATS.values() for field in fields] + [*VERIFIER_FIELDS, *LABEL_FIELDS, PAIR_NOTE])
)
_REFUSED_FIELDS = {
    "tools": "tool descriptions are not trained on",
    "images": "the model reads text only",
    "image": "the model reads text only",
    "completions": "stepwise supervision is used by no stage",
}


def normalise(record: Mapping[str, Any], where: str | None = None) -> Record:
    """Turn a record in any of TRL's formats into the conversational one.

    Plain strings become messages: a prompt the user's, an answer the assistant's, a `text` one assistant turn. An implicit
    prompt is the common beginning of `chosen` and `rejected`. Columns that no format knows are left out; null counts as absent.

    Args:
        record: field name -> value.
        where: place named in errors ("data.jsonl:17").

    Raises:
        UserError: no known set of fields, a field of the wrong type, or content that no stage can use.
    """
    present = {name: value for name, value in record.items() if value is not None}
    name = _format_of(present, where)
    fields = FORMATS[name]
    result: Record = {}
    if name == "preference with implicit prompt":
        result = _split_common_prompt(present["chosen"], present["rejected"], where)
    elif name == "preference" and isinstance(present["prompt"], str) and not isinstance(present["chosen"], str):
        # Hub datasets (UltraFeedback) repeat the prompt as text beside whole conversations.
        result = _split_common_prompt(present["chosen"], present["rejected"], where)
        result["prompt"] = result["prompt"] or _messages(present["prompt"], "prompt", "user", where)
    elif name == "language modelling (text)":
        result["messages"] = _messages(present["text"], "text", "assistant", where)
    else:
        for field in fields:
            role = "user" if field == "prompt" else "assistant"
            result[field] = _messages(present[field], field, role, where)
    for field in ("completion", "chosen", "rejected"):
        if field in result and (not result[field] or result[field][-1]["role"] != "assistant"):
            raise UserError(f"'{field}' does not end with an assistant message", where=where)
    if "messages" in result and not any(message["role"] == "assistant" for message in result["messages"]):
        raise UserError(f"'{fields[0]}' has no assistant message", where=where)
    if "prompt" in result and not result["prompt"]:
        raise UserError("the prompt is empty", where=where)
    return result | _verifier_fields(present, where) | _labels(present, where)


def prompt_key(record: Record) -> str:
    """Text that identifies a normalised record's prompt: records with the same key may not lie in two splits."""
    if "prompt" in record:
        messages = record["prompt"]
    else:
        answers = [i for i, message in enumerate(record["messages"]) if message["role"] == "assistant"]
        # A conversation that opens with its last answer (plain text) has no prompt: the whole identifies it.
        messages = record["messages"][: answers[-1]] or record["messages"]
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


def _format_of(record: Mapping[str, Any], where: str | None) -> str:
    for field, reason in _REFUSED_FIELDS.items():
        if record.get(field):
            raise UserError(f"column '{field}': {reason}", where=where, instead="remove the column")
    if isinstance(record.get("label"), bool):
        raise UserError(
            "unpaired preference (column 'label') is used by no stage", where=where, instead="give 'chosen' and 'rejected'"
        )
    columns = ", ".join(sorted(record)) or "none"
    for column in record:
        if column not in _KNOWN_FIELDS:
            match = nearest(column, [field for field in _KNOWN_FIELDS if field not in record], cutoff=0.85)
            if match:
                raise UserError(
                    f"unknown column '{column}' (columns: {columns})", where=where, instead=f"did you mean '{match}'?"
                )
    if ("chosen" in record) != ("rejected" in record):
        given, missing_one = ("chosen", "rejected") if "chosen" in record else ("rejected", "chosen")
        raise UserError(f"'{given}' without '{missing_one}' (columns: {columns})", where=where, instead="a preference has both")
    for name, fields in FORMATS.items():
        if all(field in record for field in fields):
            return name
    closest = max(FORMATS, key=lambda name: sum(field in record for field in FORMATS[name]) / len(FORMATS[name]))
    missing = [field for field in FORMATS[closest] if field not in record]
    raise UserError(
        f"columns of no known format ({columns})",
        where=where,
        instead=f"the nearest is {closest}, which also needs {', '.join(missing)}",
    )


def _messages(value: Any, field: str, role: str, where: str | None) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise UserError(f"'{field}' is {_kind(value)}", where=where, instead="should be text or a list of messages")
    return [_message(message, f"{field}[{i}]", where) for i, message in enumerate(value)]


def _message(message: Any, place: str, where: str | None) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(
            f"'{place}' is {_kind(message)}", where=where, instead='should be a message like {"role": "user", "content": "..."}'
        )
    for key in ("role", "content"):
        if message.get(key) is None:
            raise UserError(
                f"'{place}' has no '{key}'", where=where, instead='a message looks like {"role": "user", "content": "..."}'
            )
    if message.get("tool_calls"):
        raise UserError(f"'{place}' has tool_calls", where=where, instead="write the calls into the content")
    role = "assistant" if message["role"] == "ai" else message["role"]
    if role not in ROLES:
        raise UserError(f"'{place}' has the unknown role {role!r}", where=where, instead=suggest(str(role), ROLES))
    return {"role": role, "content": _text(message["content"], f"{place}.content", where)}


def _text(content: Any, place: str, where: str | None) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UserError(f"'{place}' is {_kind(content)}", where=where, instead="should be text or a list of text blocks")
    texts: list[str] = []
    for block in content:
        if not isinstance(block, Mapping) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise UserError(
                f"'{place}' has a block that is not text", where=where, instead='blocks look like {"type": "text", "text": "..."}'
            )
        texts.append(block["text"])
    return "".join(texts)


def _split_common_prompt(chosen: Any, rejected: Any, where: str | None) -> Record:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError("one of 'chosen' and 'rejected' is text, the other is not", where=where)
    if isinstance(chosen, str):
        return _split_common_text(chosen, rejected, where)
    chosen = _messages(chosen, "chosen", "assistant", where)
    rejected = _messages(rejected, "rejected", "assistant", where)
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) or common == len(rejected):
        raise UserError("'chosen' and 'rejected' do not differ in an answer", where=where)
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _split_common_text(chosen: str, rejected: str, where: str | None) -> Record:
    if chosen == rejected:
        raise UserError("'chosen' and 'rejected' do not differ", where=where)
    common = len(os.path.commonprefix([chosen, rejected]))
    if common and chosen[common - 1] == " ":  # as TRL's extract_prompt does: the space belongs to the answers
        common -= 1
    return {
        "prompt": [{"role": "user", "content": chosen[:common]}] if common else [],
        "chosen": [{"role": "assistant", "content": chosen[common:]}],
        "rejected": [{"role": "assistant", "content": rejected[common:]}],
    }


def _verifier_fields(record: Mapping[str, Any], where: str | None) -> Record:
    fields: Record = {}
    for name in VERIFIER_FIELDS:
        if name not in record:
            continue
        value = record[name]
        # Common names of columns that no verifier asked for; a judge goes by an answer without one.
        if "verifier" not in record and (name == "metadata" or (name in ("answer", "domain") and not isinstance(value, str))):
            continue
        if name in ("metadata", "constraints") and isinstance(value, Mapping | list):
            value = json.dumps(value, ensure_ascii=False)
        if not isinstance(value, str):
            raise UserError(f"'{name}' is {_kind(value)}", where=where, instead="should be text")
        fields[name] = value
    return fields


def _labels(record: Mapping[str, Any], where: str | None) -> Record:
    labels: Record = {}
    for name in LABEL_FIELDS:
        if name not in record:
            continue
        value = record[name]
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise UserError(f"'{name}' is no JSON", where=where, instead='should be like {"correctness": 1.0}') from None
        if not isinstance(value, Mapping):
            raise UserError(f"'{name}' is {_kind(value)}", where=where, instead='should be like {"correctness": 1.0}')
        labels[name] = {
            target: _share(number, f"{name}.{target}", where) for target, number in value.items() if number is not None
        }
        for target in labels[name]:
            if target not in TARGETS:
                raise UserError(f"'{name}' names the unknown dimension '{target}'", where=where, instead=suggest(target, TARGETS))
    if PAIR_NOTE in record and "chosen" in record:
        if not isinstance(record[PAIR_NOTE], str):
            raise UserError(f"'{PAIR_NOTE}' is {_kind(record[PAIR_NOTE])}", where=where, instead="should be text")
        labels[PAIR_NOTE] = record[PAIR_NOTE]
    return labels


def _share(value: Any, place: str, where: str | None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"'{place}' is {value!r}", where=where, instead="should be a number from 0 to 1")
    return float(value)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), f"a {type(value).__name__}")
