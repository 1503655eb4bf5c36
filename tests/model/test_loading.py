"""Checkpoints: what is written is read back bit by bit, and whatever does not fit is named in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

import posttrain.model.registration  # noqa: F401
from posttrain.config.errors import UserError
from posttrain.config.schema import ModelSection
from posttrain.data.tokenizer import load_tokenizer, train_tokenizer
from posttrain.model import loading
from posttrain.model.loading import load_causal_lm, load_config, load_reward_model, load_weights, new_model, save_model
from posttrain.model.modeling import MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification
from tests.model.small import packed, random_tokens, small_config, small_model

SECTION = ModelSection(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rotary_dim=8,
    softmax_every=2,
    intermediate_size=16,
    num_local_experts=2,
)
VOCABULARY = 300
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["What is 12 + 34? 46"], VOCABULARY)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    save_model(new_model(SECTION, VOCABULARY, 1), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether all tensors are of one type, shape and value, bit by bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [loading.SHARD_BYTES, 20_000, 1])
def test_a_saved_model_comes_back_bit_by_bit(
    dtype: str, shard_bytes: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SHARD_BYTES", shard_bytes)
    model = new_model(SECTION.model_copy(update={"dtype": dtype}), VOCABULARY, 1, eos_token_id=3)
    save_model(model, tokenizer, tmp_path)
    back = load_causal_lm(tmp_path)
    assert same(model, back)
    assert back.config.to_dict() == model.config.to_dict()
    tokens, layout = packed(random_tokens(70), random_tokens(3))
    with torch.no_grad():
        assert torch.equal(model(tokens, layout=layout).logits, back(tokens, layout=layout).logits)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shard_bytes == loading.SHARD_BYTES and shard_bytes > 20_000:
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / loading.INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    if shard_bytes == 1:
        assert len(files) == len(model.state_dict())


@pytest.mark.parametrize(("before", "after"), [(20_000, loading.SHARD_BYTES), (loading.SHARD_BYTES, 20_000), (1, 20_000)])
def test_a_second_save_into_a_folder_leaves_nothing_of_the_first(
    before: int, after: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = new_model(SECTION, VOCABULARY, 1), new_model(SECTION, VOCABULARY, 2)
    monkeypatch.setattr(loading, "SHARD_BYTES", before)
    save_model(first, tokenizer, tmp_path)
    monkeypatch.setattr(loading, "SHARD_BYTES", after)
    save_model(second, tokenizer, tmp_path)
    assert same(load_causal_lm(tmp_path), second)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), second)


def test_a_state_dict_from_elsewhere_is_written_in_place_of_the_models_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, other = new_model(SECTION, VOCABULARY, 1), new_model(SECTION, VOCABULARY, 2)
    save_model(model, tokenizer, tmp_path, other.state_dict())
    assert same(load_causal_lm(tmp_path), other)


def test_settings_of_generation_travel_with_the_model(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert not (folder / "generation_config.json").exists(), "config.json says it all"
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 3}')  # no do_sample: not valid strictly
    model = load_causal_lm(folder)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.7, 3)
    save_model(model, tokenizer, tmp_path / "again")
    assert load_causal_lm(tmp_path / "again").generation_config.temperature == 0.7
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match="generation_config.json: broken JSON"):
        load_causal_lm(folder)


def test_without_a_type_in_the_configuration_the_files_decide(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    del fields["dtype"]
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / loading.WEIGHTS).items()}
    save_file(tensors, folder / loading.WEIGHTS)
    model = load_causal_lm(folder)
    assert model.config.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert model.get_parameter(ROUTER).dtype == torch.float32


def test_weights_are_read_into_a_model_of_another_type(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps, as a model on another device is; a checkpoint's fp32 values are rounded to the model's bf16."""
    monkeypatch.setattr(loading, "STAGING_BYTES", 100)
    model = new_model(SECTION.model_copy(update={"dtype": "bfloat16"}), VOCABULARY, 2)
    load_weights(model, folder)
    for name, tensor in load_file(folder / loading.WEIGHTS).items():
        assert model.get_parameter(name).equal(tensor if name.endswith("moe.gate.weight") else tensor.bfloat16()), name


def test_a_buffer_that_no_checkpoint_holds_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = MiniMaxText01ForCausalLM.__init__

    def with_buffer(self: Any, config: Any) -> None:
        original(self, config)
        self.register_buffer("table", torch.zeros(3), persistent=False)

    monkeypatch.setattr(MiniMaxText01ForCausalLM, "__init__", with_buffer)
    with pytest.raises(ValueError, match="table is a buffer"):
        load_causal_lm(folder)


def damage_cases() -> dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], list[str]]]:
    return {
        "missing": (lambda t: t.pop(ROUTER), ["missing", ROUTER, "[2, 32]"]),
        "extra": (lambda t: t.update(stray=torch.zeros(3)), ["extra", "stray", "[3]"]),
        "misshapen": (lambda t: t.update({ROUTER: torch.zeros(3, 32)}), [ROUTER, "[3, 32]", "expected [2, 32]"]),
        "transposed": (lambda t: t.update({ROUTER: t[ROUTER].T.contiguous()}), [ROUTER, "[32, 2]", "expected [2, 32]"]),
        "all": (lambda t: [t.pop(name) for name in list(t)[:-1]], ["missing", "model.embed_tokens.weight", "more"]),
    }


@pytest.mark.parametrize("case", damage_cases())
def test_tensors_that_do_not_fit_are_named_and_change_nothing(case: str, folder: Path) -> None:
    change, parts = damage_cases()[case]
    tensors = load_file(folder / loading.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / loading.WEIGHTS)
    with pytest.raises(UserError) as error:
        load_causal_lm(folder)
    one_line(error, str(folder), *parts)
    model = new_model(SECTION, VOCABULARY, 5)
    with pytest.raises(UserError):
        load_weights(model, folder)
    assert same(model, new_model(SECTION, VOCABULARY, 5))


def break_file(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("model.safetensors", None, "missing"),
        ("model.safetensors", b"", "damaged"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "damaged"),
        ("config.json", None, "config.json is missing"),
        ("config.json", b"{", "broken JSON"),
        ("config.json", b'{"model_type": "llama"}', "llama"),
        ("config.json", b'{"model_type": "minimax_text_01", "num_attention_heads": 3, "num_key_value_heads": 2}', "divisible"),
        ("model.safetensors.index.json", b"{", loading.INDEX),
        ("model.safetensors.index.json", b"{}", loading.INDEX),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "model-00001"),
    ],
)
def test_damaged_checkpoints_are_one_line(name: str, content: bytes | None, part: str, folder: Path) -> None:
    break_file(folder, name, content)
    with pytest.raises(UserError) as error:
        load_causal_lm(folder)
    one_line(error, str(folder), part)


def test_half_a_file_of_weights_is_damaged(folder: Path) -> None:
    whole = (folder / loading.WEIGHTS).read_bytes()
    for cut in (4, 100, len(whole) // 2, len(whole) - 1):
        (folder / loading.WEIGHTS).write_bytes(whole[:cut])
        with pytest.raises(UserError, match="damaged"):
            load_causal_lm(folder)


def test_gates_stay_fp32_in_a_bf16_model(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save_model(new_model(SECTION.model_copy(update={"dtype": "bfloat16"}), VOCABULARY, 1), tokenizer, tmp_path)
    on_disk = load_file(tmp_path / loading.WEIGHTS)
    for tensors in (
        on_disk,
        load_causal_lm(tmp_path).state_dict(),
        load_reward_model(tmp_path, from_causal_lm=True).state_dict(),
    ):
        for name, tensor in tensors.items():
            gate = name.endswith("block_sparse_moe.gate.weight")
            assert tensor.dtype == (torch.float32 if gate else torch.bfloat16), name
    assert sum(name.endswith("block_sparse_moe.gate.weight") for name in on_disk) == 2


def test_a_new_model_is_a_function_of_its_seed() -> None:
    torch.manual_seed(3)
    first = new_model(SECTION, VOCABULARY, 1)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after), "the global generator was moved"
    assert same(first, new_model(SECTION, VOCABULARY, 1))
    other = new_model(SECTION, VOCABULARY, 2)
    for name, tensor in first.state_dict().items():
        if "norm" not in name:
            assert not torch.equal(tensor, other.state_dict()[name]), name


def test_initial_weights_have_the_range_asked_for() -> None:
    model = new_model(SECTION.model_copy(update={"initializer_range": 0.05}), VOCABULARY, 1)
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert tensor.std().item() == pytest.approx(0.05, rel=0.3), name
            assert abs(tensor.mean().item()) < 0.02, name


def test_the_section_and_the_token_ids_reach_the_configuration() -> None:
    config = new_model(SECTION, VOCABULARY, 1, bos_token_id=1, eos_token_id=2, pad_token_id=0).config
    for name, value in SECTION.model_dump(exclude={"path", "softmax_every", "dtype"}).items():
        assert getattr(config, name) == value, name
    assert config.attn_type_list == [0, 1]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"attn_type_list": [0, 1]}, "attn_type_list"),
        ({"attn_type_list": [0, 1, 2]}, "attn_type_list"),
        ({"num_key_value_heads": 3}, "key/value"),
        ({"rotary_dim": 3}, "rotary_dim"),
        ({"rotary_dim": 10}, "rotary_dim"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        small_config(**changes)


def test_auto_classes_know_the_model(folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is type(load_config(folder))
    ours = load_causal_lm(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is MiniMaxText01ForCausalLM and same(ours, theirs)
    tokens, layout = packed(random_tokens(70))
    with torch.no_grad():
        assert torch.equal(theirs(tokens, layout=layout).logits, ours(tokens, layout=layout).logits)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32} == {
        f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (0, 1)
    }
    scorer = AutoModelForSequenceClassification.from_config(ours.config)
    assert type(scorer) is MiniMaxText01ForSequenceClassification


def test_what_transformers_saves_loads_here(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    assert same(load_causal_lm(tmp_path), model)


def test_a_reward_model_starts_from_a_language_model_without_an_opinion(folder: Path) -> None:
    model = load_reward_model(folder, from_causal_lm=True)
    assert same(model.model, load_causal_lm(folder).model)
    tokens, layout = packed(random_tokens(5), random_tokens(70))
    assert torch.equal(model(tokens, layout=layout).logits, torch.zeros(2, 1))


def test_a_saved_reward_model_comes_back(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_reward_model(folder, from_causal_lm=True)
    torch.nn.init.normal_(model.score.weight)
    save_model(model, tokenizer, tmp_path / "reward")
    back = load_reward_model(tmp_path / "reward")
    assert same(back, model) and back.config.architectures == ["MiniMaxText01ForSequenceClassification"]
    tokens, layout = packed(random_tokens(5), random_tokens(70))
    with torch.no_grad():
        assert torch.equal(model(tokens, layout=layout).logits, back(tokens, layout=layout).logits)


def test_a_language_model_is_no_reward_model_and_the_other_way_round(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError) as error:
        load_reward_model(folder)
    one_line(error, "missing score.weight", "extra lm_head.weight")
    save_model(load_reward_model(folder, from_causal_lm=True), tokenizer, tmp_path / "reward")
    with pytest.raises(UserError) as error:
        load_causal_lm(tmp_path / "reward")
    one_line(error, "missing lm_head.weight", "extra score.weight")
