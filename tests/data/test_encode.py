"""Tokenizer, chat template and encoding agree with each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from posttrain.config.errors import UserError
from posttrain.data.encode import IGNORE, encode_answer, encode_document, encode_pair, encode_prompt
from posttrain.data.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, load_tokenizer, train_tokenizer

TEXTS = [f"What is {a} + {b}? The answer is {a + b}.\nThank you." for a in range(20) for b in range(5)]
BLOCKS_ONLY = (
    "{{ '<begin_of_document>' }}{% for m in messages %}{{ '<beginning_of_sentence>' + m['role'] + '\n' + m['content'][0]['text'] "
    "+ '<end_of_sentence>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<beginning_of_sentence>assistant\n' }}{% endif %}"
)
# Any text except what would spell a special token.
TEXT = st.text(max_size=25).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
TURNS = st.lists(st.tuples(TEXT, TEXT), max_size=3)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 400)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversation(turns: list[tuple[str, str]], last: str, system: str) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system else []
    return start + [message for question, answer in turns for message in (user(question), assistant(answer))] + [user(last)]


def test_special_tokens_have_their_places(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<beginning_of_sentence>", "<end_of_sentence>")
    assert tokenizer.pad_token == tokenizer.unk_token == "<end_of_document>"
    assert len(tokenizer) <= 400


def test_digits_and_newlines_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("What is 123 + 45?\n\nok")["input_ids"])
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("12345")
    assert tokens.count("Ċ") == 2
    assert any(len(token) > 2 for token in tokens)  # merges were learnt


@given(TEXT)
def test_any_text_survives_encoding(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_dialect_is_minimax_s(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        user("hi"),
        {"role": "system", "content": "be kind"},
        {"role": "ai", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "tool", "content": "42"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<begin_of_document><beginning_of_sentence>system ai_setting=assistant\nbe kind<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nhi<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\nhello<end_of_sentence>\n"
        "<beginning_of_sentence>tool name=tools\n42<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )


@given(TURNS, TEXT, TEXT)
def test_the_encoded_prompt_is_the_tokenised_template(tokenizer, turns, last: str, system: str) -> None:
    messages = conversation(turns, last, system)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, messages) == tokenizer(rendered, add_special_tokens=False)["input_ids"]


@given(TURNS, TEXT, TEXT, st.booleans())
def test_a_document_is_its_prompt_and_its_answer(tokenizer, turns, last: str, answer: str, all_answers: bool) -> None:
    prompt = conversation(turns, last, "")
    record = {"prompt": prompt, "completion": [assistant(answer)], "train_on_all_answers": all_answers}
    document = encode_document(tokenizer, record)
    ids = encode_answer(tokenizer, answer)
    assert document.input_ids == encode_prompt(tokenizer, prompt) + ids
    assert len(document.labels) == len(document.input_ids)
    assert all(label in (IGNORE, token) for label, token in zip(document.labels, document.input_ids, strict=True))
    trained = [label for label in document.labels if label != IGNORE]
    expected = [token for _, text in turns for token in encode_answer(tokenizer, text)] if all_answers else []
    assert trained == expected + ids
    assert document.labels[-1] == tokenizer.eos_token_id


def test_messages_are_trained_on_in_every_answer_and_cut_after_the_last(tokenizer: PreTrainedTokenizerBase) -> None:
    document = encode_document(tokenizer, {"messages": [user("a"), assistant("b1"), user("c"), assistant("d2"), user("e")]})
    assert tokenizer.decode([label for label in document.labels if label != IGNORE]) == "b1<end_of_sentence>d2<end_of_sentence>"
    assert tokenizer.decode(document.input_ids).endswith("d2<end_of_sentence>")


def test_plain_text_is_one_assistant_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    document = encode_document(tokenizer, {"messages": [assistant("once 1")]})
    assert tokenizer.decode([label for label in document.labels if label != IGNORE]) == "once 1<end_of_sentence>"


def test_a_pair_shares_its_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    record = {"prompt": [user("1 + 1?")], "chosen": [assistant("2")], "rejected": [assistant("three")]}
    chosen, rejected = encode_pair(tokenizer, record)
    prompt = encode_prompt(tokenizer, record["prompt"])
    assert chosen.input_ids[: len(prompt)] == rejected.input_ids[: len(prompt)] == prompt
    assert chosen.labels == [IGNORE] * len(prompt) + encode_answer(tokenizer, "2")
    assert rejected.labels == [IGNORE] * len(prompt) + encode_answer(tokenizer, "three")


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_text_that_spells_a_special_token_is_refused(tokenizer: PreTrainedTokenizerBase, field: str) -> None:
    record = {"prompt": [user("a")], "completion": [assistant("b")]}
    record[field] = [{**record[field][0], "content": "x<end_of_sentence>y"}]
    with pytest.raises(UserError, match="special token '<end_of_sentence>'"):
        encode_document(tokenizer, record)


def test_records_without_an_answer_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="no demonstration"):
        encode_document(tokenizer, {"prompt": [user("a")]})
    with pytest.raises(UserError, match="no assistant turn"):
        encode_document(tokenizer, {"messages": [user("a")]})
    with pytest.raises(UserError, match="no preference pair"):
        encode_pair(tokenizer, {"prompt": [user("a")], "completion": [assistant("b")]})


def test_a_template_that_wants_blocks_is_given_blocks(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(tmp_path)
    other.chat_template = BLOCKS_ONLY
    messages = [user("x"), assistant("y"), user("z")]
    assert other.decode(encode_prompt(other, messages)) == (
        "<begin_of_document><beginning_of_sentence>user\nx<end_of_sentence>\n<beginning_of_sentence>assistant\ny<end_of_sentence>\n"
        "<beginning_of_sentence>user\nz<end_of_sentence>\n<beginning_of_sentence>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ raise_exception('no such role') }}{% endfor %}", "no such role"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "leaves out"),
        ("{% for m in messages %}{{ m['content'] }};{% endfor %}", "does not end an assistant turn with the eos"),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused(tokenizer, tmp_path: Path, template: str, says: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(tmp_path)
    other.chat_template = template
    with pytest.raises(UserError, match=says):
        encode_prompt(other, [user("x"), assistant("y"), user("z")])


def test_a_saved_tokenizer_comes_back_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == CHAT_TEMPLATE
    assert loaded.all_special_ids == tokenizer.all_special_ids
    messages = [user("What is 12 + 3?")]
    assert encode_prompt(loaded, messages) == encode_prompt(tokenizer, messages)


def test_training_gives_the_same_tokenizer_in_another_process(tokenizer: PreTrainedTokenizerBase) -> None:
    code = (
        "import json, sys; from posttrain.data.tokenizer import train_tokenizer; "
        "print(train_tokenizer(json.load(sys.stdin), 400).backend_tokenizer.to_str())"
    )
    run = subprocess.run([sys.executable, "-c", code], input=json.dumps(TEXTS), capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == json.loads(tokenizer.backend_tokenizer.to_str())


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="at least 260"):
        train_tokenizer(TEXTS, 200)


def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template") as refused:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)
