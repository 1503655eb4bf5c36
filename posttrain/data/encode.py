"""From messages to token ids, the one way for training and for rollouts.

An answer is tokenised apart from what precedes it, because that is how a rollout meets it: the prompt's ids are fixed
when the first token of the answer is drawn. Tokenising the joined text instead could merge across that border and train
on tokens that are never sampled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.config.errors import UserError

IGNORE = -100
"""Label of a token that is not trained on."""

Messages = Sequence[Mapping[str, Any]]

# Stand-ins for assistant texts while the template is rendered: two private-use characters around the turn's number.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_STAND_IN = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@dataclass(frozen=True)
class Document:
    """A training document.

    Attributes:
        input_ids: token ids.
        labels: per token, the token itself where it is trained on, else -100; not shifted.
    """

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a conversation, up to and including the header after which the assistant speaks.

    Raises:
        UserError: the chat template cannot render the messages, or a message spells out a special token.
    """
    ids, _ = _encode_context(tokenizer, messages)
    return ids


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an assistant's text, ended by the stop token (`eos_token_id`)."""
    _refuse_special_tokens(tokenizer, text)
    return [*_tokenise(tokenizer, [text])[0], _stop_id(tokenizer)]


def encode_document(tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]) -> Document:
    """Encode a record's demonstration: `prompt` + `completion`, or `messages`.

    Trained on are the assistant's tokens, each turn's stop token included: those of the completion; with
    `train_on_all_answers`, or for a record with `messages`, those of every assistant turn. What follows the last
    assistant turn is left out.

    Raises:
        UserError: the record has no assistant turn to train on, or see `encode_prompt`.
    """
    if "completion" in record:
        return _encode(tokenizer, record.get("prompt", ()), record["completion"], bool(record.get("train_on_all_answers")))
    if "messages" not in record:
        raise UserError(
            f"record has no demonstration (fields: {', '.join(sorted(record))})", instead="needs 'completion' or 'messages'"
        )
    return _encode(tokenizer, (), record["messages"], True)


def encode_pair(tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]) -> tuple[Document, Document]:
    """Encode a preference record: (`prompt` + `chosen`, `prompt` + `rejected`), labels on the answers.

    Raises:
        UserError: see `encode_document`.
    """
    if "chosen" not in record or "rejected" not in record:
        raise UserError(
            f"record is no preference pair (fields: {', '.join(sorted(record))})", instead="needs 'chosen' and 'rejected'"
        )
    prompt = record.get("prompt", ())
    return _encode(tokenizer, prompt, record["chosen"], False), _encode(tokenizer, prompt, record["rejected"], False)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Messages, completion: Messages, all_answers: bool) -> Document:
    messages = [*prompt, *completion]
    last = max((i for i, message in enumerate(messages) if _is_assistant(message)), default=-1)
    if last < (len(prompt) if completion else 0):
        raise UserError("record has no assistant turn to train on", instead="its last message should be the assistant's")
    ids, answers = _encode_context(tokenizer, messages[:last])
    if not all_answers:
        in_prompt = sum(_is_assistant(message) for message in prompt)
        answers = answers[in_prompt:]
    answer = encode_answer(tokenizer, messages[last]["content"])
    labels = [IGNORE] * len(ids)
    for start, stop in answers:
        labels[start:stop] = ids[start:stop]
    return Document(ids + answer, labels + answer)


def _encode_context(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids with generation prompt, and [start, stop) of each assistant answer in them, stop token included."""
    parts = _split(tokenizer, messages)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, tokens in enumerate(_tokenise(tokenizer, parts)):
        if number % 2 == 0 and number > 0:
            # The template's text after an answer: its first token must be the stop token the answer ended with.
            if not tokens or tokens[0] != _stop_id(tokenizer):
                raise UserError(
                    f"chat template does not end an assistant turn with the eos token {tokenizer.eos_token!r}",
                    where="chat template",
                )
            start, stop = spans[-1]
            spans[-1] = (start, stop + 1)
        if number % 2 == 1:
            spans.append((len(ids), len(ids) + len(tokens)))
        ids.extend(tokens)
    return ids, spans


def _split(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[str]:
    """The rendered conversation cut at its assistant texts: template, answer, template, answer, ..., template."""
    answers: list[str] = []
    rendered_messages: list[dict[str, Any]] = []
    for message in messages:
        text = message["content"]
        _refuse_special_tokens(tokenizer, text)
        if _is_assistant(message):
            answers.append(text)
            text = f"{_OPEN}{len(answers) - 1}{_CLOSE}"
        rendered_messages.append({"role": message["role"], "content": text})
    pieces = _STAND_IN.split(_render(tokenizer, rendered_messages))
    if pieces[1::2] != [str(i) for i in range(len(answers))]:
        raise UserError(
            "chat template leaves out or reorders assistant turns",
            where="chat template",
            instead="it must show every turn once, in order",
        )
    pieces[1::2] = answers
    return pieces


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    template = tokenizer.get_chat_template()
    if not _takes_plain_text(template):
        messages = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    try:
        # What apply_chat_template does, but for its refusal of an empty conversation: a plain text has no prompt.
        rendered: Any = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **tokenizer.special_tokens_map
        )
    except jinja2.TemplateError as error:
        raise UserError(f"chat template cannot render the messages: {error}", where="chat template") from error
    return rendered[0][0]


@lru_cache(maxsize=16)
def _takes_plain_text(template: str) -> bool:
    """Whether the template shows content given as a string; MiniMax-M1's published one wants a list of blocks."""
    try:
        # Annotated as str by the library; in fact the rendered texts and their generation masks.
        rendered: Any = render_jinja_template([[{"role": "user", "content": _OPEN}]], chat_template=template)
    except jinja2.TemplateError:
        return False
    return _OPEN in rendered[0][0]


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _refuse_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    for token in tokenizer.all_special_tokens:
        if token in text:
            # Encoded, it would end the turn or open another: a message must not be able to.
            raise UserError(f"a message contains the special token {token!r}", instead="remove it from the data")


def _stop_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.eos_token_id)


def _is_assistant(message: Mapping[str, Any]) -> bool:
    return message["role"] in ("assistant", "ai")
