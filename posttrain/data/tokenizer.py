"""Tokenizers: trained for models made from scratch, loaded for checkpoints; MiniMax's chat dialect for both.

The dialect (MiniMax-M1's published chat template; MiniMax-Text-01 speaks the same): a document opens with
`<begin_of_document>`; a turn is `<beginning_of_sentence>HEADER\\nTEXT<end_of_sentence>\\n`, where HEADER is
`system ai_setting=assistant`, `user name=user`, `ai name=assistant` or `tool name=tools`; the model is asked to speak by
`<beginning_of_sentence>ai name=assistant\\n` and stops with `<end_of_sentence>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from posttrain.config.errors import UserError
from posttrain.data.tokenizer_files import no_chat_template

END_OF_DOCUMENT = "<end_of_document>"
BEGIN_OF_DOCUMENT = "<begin_of_document>"
BEGIN_OF_SENTENCE = "<beginning_of_sentence>"
END_OF_SENTENCE = "<end_of_sentence>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, BEGIN_OF_DOCUMENT, BEGIN_OF_SENTENCE, END_OF_SENTENCE)
"""In the order of their ids, which start at 0."""

_TURN_HEADERS = ("user name=user", "ai name=assistant")

CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for block in message['content'] if block['type'] == 'text' -%}
      {%- if message['role'] == 'tool' and block['name'] is defined -%}
        {{- 'tool name: ' + block['name'] + '\\ntool result: ' + block['text'] + '\\n\\n' -}}
      {%- else -%}
        {{- block['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- '<begin_of_document>' -}}
{%- set system = namespace(text='') -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set system.text = system.text + text_of(message) -%}
{%- endfor -%}
{%- if system.text != '' -%}
  {{- '<beginning_of_sentence>system ai_setting=assistant\\n' + system.text + '<end_of_sentence>\\n' -}}
{%- endif -%}
{%- if tools -%}
  {{- '<beginning_of_sentence>system tool_setting=tools\\nYou are provided with these tools:\\n<tools>\\n' -}}
  {%- for tool in tools -%}
    {{- (tool | tojson) ~ '\\n' -}}
  {%- endfor -%}
  {{- '</tools>\\n\\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML tags, ' -}}
  {{- 'and provide tool-name and json-object of arguments, following the format below:\\n<tool_calls>\\n' -}}
  {{- '{"name": <tool-name-1>, "arguments": <args-json-object-1>}\\n...\\n</tool_calls><end_of_sentence>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '<beginning_of_sentence>user name=user\\n' + text_of(message) + '<end_of_sentence>\\n' -}}
  {%- elif message['role'] in ('assistant', 'ai') -%}
    {{- '<beginning_of_sentence>ai name=assistant\\n' + text_of(message) + '<end_of_sentence>\\n' -}}
  {%- elif message['role'] == 'tool' -%}
    {{- '<beginning_of_sentence>tool name=tools\\n' + text_of(message) + '<end_of_sentence>\\n' -}}
  {%- elif message['role'] != 'system' -%}
    {{- raise_exception("unknown role '" ~ message['role'] ~ "'; known: system, user, assistant, tool") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<beginning_of_sentence>ai name=assistant\\n' -}}
{%- endif -%}
"""
"""Jinja template of the dialect; content is a string or a list of `{"type": "text", "text": ...}` blocks."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on message texts and give it MiniMax's special tokens and chat template.

    Any text can be encoded (all 256 bytes are tokens). Digits and newlines are tokens of their own, so that numbers are
    read digit by digit and no token reaches across the line that separates a turn's header from its text. The same texts
    in the same order give the same tokenizer. `<beginning_of_sentence>` is bos, `<end_of_sentence>` eos (the stop token),
    `<end_of_document>` unk and padding (it never occurs inside a document).

    Args:
        texts: contents of messages, without template; the headers of turns are added once a text.
        vocab_size: tokens at most, special ones and bytes included; fewer when the texts give no more merges.

    Raises:
        UserError: vocab_size is too small for bytes and special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"vocabulary of {vocab_size} tokens", where="tokenizer.vocab_size", instead=f"needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_headers(texts), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN_OF_SENTENCE,
        eos_token=END_OF_SENTENCE,
        unk_token=END_OF_DOCUMENT,
        pad_token=END_OF_DOCUMENT,
        extra_special_tokens=[BEGIN_OF_DOCUMENT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Raises:
        UserError: no such folder, no readable tokenizer in it, no chat template, or no end-of-sentence token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError("no such folder", where=str(path), instead="give the folder of a checkpoint with its tokenizer")
    try:
        # Any configuration keeps it from reading the model's, whose type only model/ registers, and warning about it.
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, config=PreTrainedConfig())
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no readable tokenizer ({reason})", where=str(path), instead="put tokenizer.json and tokenizer_config.json there"
        ) from error
    if not tokenizer.chat_template:
        raise no_chat_template(path)
    if tokenizer.eos_token_id is None:
        raise UserError(
            "tokenizer has no eos_token", where=str(path), instead="name the token that ends a turn in tokenizer_config.json"
        )
    return tokenizer


def _with_headers(texts: Iterable[str]) -> Iterator[str]:
    # Every document shows these headers, so the merges are worth their place in a small vocabulary.
    for text in texts:
        yield text
        yield from _TURN_HEADERS
