"""Converting checkpoints: no bit changes, whatever does not fit is named, and nothing that is not whole looks whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MiniMaxForCausalLM

import posttrain.model.registration  # noqa: F401
from posttrain.cli import main
from posttrain.config.errors import UserError
from posttrain.model import convert as module
from posttrain.model.checkpoint_files import check_checkpoint
from posttrain.model.convert import convert
from posttrain.model.loading import fresh_model, load_causal_lm, load_reward_model, load_weights, save_model
from posttrain.model.naming import SCHEMES, Scheme, is_derived
from posttrain.model.presets import preset
from posttrain.model.registration import MiniMaxM1ForCausalLM
from tests.model.schemes import native_model, official_config, same_bits, stored_tensors, write_official
from tests.model.small import packed, random_tokens, small_config, small_model

W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return write_official(tmp_path / "source")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_there_and_back_through_every_kind_changes_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    path = [write_official(tmp_path / "0", dtype)]
    schemes: list[Scheme] = ["posttrain", "native", "posttrain", "official"]
    for number, scheme in enumerate(schemes, start=1):
        convert(path[-1], tmp_path / str(number), scheme, shard_bytes=10_000)
        path.append(tmp_path / str(number))
        check_checkpoint(path[-1])
    assert same_bits(stored_tensors(path[0]), stored_tensors(path[4]))
    assert same_bits(stored_tensors(path[1]), stored_tensors(path[3]))
    gates = [tensor.dtype for name, tensor in stored_tensors(path[2]).items() if name.endswith("mlp.gate.weight")]
    assert gates == [torch.float32] * 3
    first, last = config_of(path[0]), config_of(path[4])
    # transformers has one name for both models, so the way through it forgets which of them it was.
    other = {"auto_map", "use_cache", "transformers_version", "model_type", "architectures", "block_size"}
    assert {name: first[name] for name in first.keys() - other} == {name: last.get(name) for name in first.keys() - other}


def test_a_straight_way_back_keeps_the_model_type(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "ours", "posttrain")
    convert(tmp_path / "ours", tmp_path / "back", "official")
    assert config_of(tmp_path / "ours")["model_type"] == config_of(tmp_path / "back")["model_type"] == "minimax_m1"
    assert type(load_causal_lm(tmp_path / "ours")) is MiniMaxM1ForCausalLM


def test_patterns_of_bits_that_are_no_numbers_survive(official: Path, tmp_path: Path) -> None:
    file = next(file for file in official.glob("*.safetensors") if W1 in load_file(file))
    tensors = load_file(file)
    bits = torch.arange(tensors[W1].numel(), dtype=torch.int32).mul(83).to(torch.int16)
    tensors[W1] = bits.view(torch.bfloat16).view(tensors[W1].shape)
    assert tensors[W1].isnan().any()
    save_file(tensors, file)
    convert(official, tmp_path / "ours", "posttrain")
    convert(tmp_path / "ours", tmp_path / "back", "official")
    assert same_bits(stored_tensors(official), stored_tensors(tmp_path / "back"))


def test_every_kind_loads_as_the_same_model(official: Path, tmp_path: Path) -> None:
    expected = load_causal_lm(official)
    for scheme in SCHEMES:
        convert(official, tmp_path / scheme, scheme)
        loaded = load_causal_lm(tmp_path / scheme)
        assert same_bits(loaded.state_dict(), expected.state_dict())
        assert {parameter.dtype for name, parameter in loaded.named_parameters() if ".gate." in name} == {torch.float32}
        assert loaded.lm_head.weight.dtype == torch.bfloat16
        assert loaded.generation_config.temperature == 0.7
        other = small_model(seed=5, rotary_dim=8, dtype=torch.float32)
        load_weights(other, tmp_path / scheme)
        assert other.lm_head.weight.equal(expected.lm_head.weight.float())
        reward = load_reward_model(tmp_path / scheme, from_causal_lm=True)
        assert same_bits(reward.model.state_dict(), expected.model.state_dict()) and not reward.score.weight.any()


def test_transformers_reads_what_is_written_for_it(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "native", "native")
    stock, info = MiniMaxForCausalLM.from_pretrained(tmp_path / "native", output_loading_info=True, dtype=torch.float32)
    assert all(is_derived(name) for name in info["missing_keys"])  # transformers computes slopes and decays
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = load_causal_lm(official).float().eval()
    tokens = random_tokens(70)[None]
    with torch.no_grad():
        difference = (stock.eval()(tokens).logits - ours(tokens).logits).abs().max() / ours(tokens).logits.abs().max()
    # fp32 sums in another order through three layers; slopes differ in the seventh digit (docs/checkpoints.md).
    assert difference < 5e-5


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    stock = native_model(small_config(rotary_dim=8), seed=3)
    stock.save_pretrained(tmp_path / "per expert")
    stock.save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = [set(stored_tensors(tmp_path / name)) for name in ("per expert", "stacked")]
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names[0] and "model.layers.0.mlp.gate.weight" in names[1]
    for name in ("per expert", "stacked"):
        ours = load_causal_lm(tmp_path / name)
        for own, tensor in ours.state_dict().items():
            assert tensor.equal(stock.state_dict()[own.replace(".block_sparse_moe.", ".mlp.")]), own
        convert(tmp_path / name, tmp_path / f"{name} ours", "posttrain")
    assert same_bits(stored_tensors(tmp_path / "per expert ours"), stored_tensors(tmp_path / "stacked ours"))


def test_released_files_load_through_the_auto_class(official: Path, tmp_path: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(official, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same_bits(model.state_dict(), load_causal_lm(official).state_dict())
    model.save_pretrained(tmp_path / "saved")  # under our names: what a stock Trainer restores from must be the model's own
    assert stored_tensors(tmp_path / "saved").keys() == model.state_dict().keys()
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict(), model.state_dict())


def test_side_files_come_along_and_foreign_code_does_not(official: Path, tmp_path: Path) -> None:
    for stray in ("optimizer.pt", "pytorch_model.bin", "trainer_state.json", ".hidden"):
        (official / stray).write_text("x")
    (official / "additional_chat_templates").mkdir()
    (official / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    for scheme in SCHEMES:
        target = tmp_path / scheme
        convert(official, target, scheme)
        assert AutoTokenizer.from_pretrained(target).get_vocab() == AutoTokenizer.from_pretrained(official).get_vocab()
        assert GenerationConfig.from_pretrained(target).temperature == 0.7
        assert (target / "LICENSE-MODEL").read_text() == "terms"
        assert (target / "additional_chat_templates" / "tool_use.jinja").exists()
        left = {"modeling_minimax_m1.py", "optimizer.pt", "pytorch_model.bin", "trainer_state.json", ".hidden"}
        assert not left & {path.name for path in target.iterdir()} and "auto_map" not in config_of(target)


def test_a_reward_model_is_converted(official: Path, tmp_path: Path) -> None:
    model = load_reward_model(official, from_causal_lm=True)
    torch.nn.init.normal_(model.score.weight)
    save_model(model, AutoTokenizer.from_pretrained(official), tmp_path / "ours")
    schemes: list[Scheme] = ["official", "native"]
    for scheme in schemes:
        convert(tmp_path / "ours", tmp_path / scheme, scheme)
        assert config_of(tmp_path / scheme)["architectures"][0].endswith("ForSequenceClassification")
        assert same_bits(load_reward_model(tmp_path / scheme).state_dict(), model.state_dict())


def test_half_rotary_is_not_written_for_transformers(tmp_path: Path) -> None:
    model = fresh_model(preset("tiny"), 0)
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match=r"cannot be written as native: rotary_dim 16 of head_dim 32"):
        convert(tmp_path / "ours", tmp_path / "native", "native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


@pytest.mark.parametrize("content", ["a file", "a folder with something"])
def test_a_target_that_holds_something_is_refused(content: str, official: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if content == "a file":
        target.write_text("x")
    else:
        target.mkdir()
        (target / "x").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(official, target, "posttrain")
    assert target.is_file() or [path.name for path in target.iterdir()] == ["x"]


def test_an_empty_target_is_filled(official: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    convert(official, tmp_path / "target", "posttrain")
    check_checkpoint(tmp_path / "target")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing(
    error: type[BaseException], official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = module.write_file, []

    def write(path: Path, *rest: Any) -> None:
        calls.append(path)
        assert not (tmp_path / "target").exists() and not (path.parent / "config.json").exists()
        if len(calls) == 2:
            raise error
        original(path, *rest)

    monkeypatch.setattr(module, "write_file", write)
    with pytest.raises(error):
        convert(official, tmp_path / "target", "posttrain", shard_bytes=10_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def change_file(folder: Path, name: str, change: Any) -> Path:
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.update({W1: torch.zeros(3, 32, dtype=torch.bfloat16)}), [f"{W1} is [3, 32], expected [24, 32]"]),
        (lambda t: t.update({W1: t[W1].T.contiguous()}), [f"{W1} is [32, 24], expected [24, 32]"]),
        (lambda t: t.update({W1: t[W1].float()}), [f"{W1} is F32", "experts of a layer share a type"]),
        (lambda t: t.update({W1: torch.zeros(24, 32, dtype=torch.float8_e4m3fn)}), ["damaged weights", "F8_E4M3", W1]),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, parts: list[str], official: Path, tmp_path: Path) -> None:
    change_file(official, W1, change)
    for act in (load_causal_lm, lambda folder: convert(folder, tmp_path / "target", "posttrain")):
        with pytest.raises(UserError) as error:
            act(official)
        assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), error.value
    assert not (tmp_path / "target").exists()


def test_missing_and_extra_experts_are_named_with_their_shapes(official: Path) -> None:
    file = change_file(official, W1, lambda t: t.update({W1.replace("experts.1", "experts.4"): t.pop(W1)}))
    index = official / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"].pop(W1)
    text["weight_map"][W1.replace("experts.1", "experts.4")] = file.name
    index.write_text(json.dumps(text))
    with pytest.raises(UserError) as error:
        check_checkpoint(official)
    assert f"missing {W1} [24, 32]; extra {W1.replace('experts.1', 'experts.4')} [24, 32]" in str(error.value)


def test_a_shard_that_is_not_what_the_index_says_is_named(official: Path, tmp_path: Path) -> None:
    index = official / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    other = next(file for file in set(whole.values()) if file != whole[W1])
    cases = [
        ({**whole, W1: other}, [W1, whole[W1], f"assigns to {other}"]),
        ({name: file for name, file in whole.items() if name != W1}, [W1, whole[W1], "to no file"]),
        ({**whole, "stray": other}, ["stray", other, "does not"]),
        ({**whole, W1: "model-00009-of-00003.safetensors"}, ["model-00009-of-00003.safetensors"]),
    ]
    for weight_map, parts in cases:
        index.write_text(json.dumps({"weight_map": weight_map}))
        for act in (check_checkpoint, load_causal_lm, lambda folder: convert(folder, tmp_path / "target", "native")):
            with pytest.raises(UserError) as error:
                act(official)
            assert all(part in str(error.value) for part in parts), error.value
    index.write_text(json.dumps({"weight_map": whole}))
    shutil.copyfile(official / whole[W1], official / other)
    with pytest.raises(UserError, match="assigns to"):
        load_causal_lm(official)


@pytest.mark.parametrize("cut", [0, 7, 100, -1, "longer", "header", "hole"])
def test_a_damaged_shard_is_named(cut: int | str, official: Path, tmp_path: Path) -> None:
    file = sorted(official.glob("*.safetensors"))[1]
    content = file.read_bytes()
    if cut == "longer":
        file.write_bytes(content + b"x")
    elif cut == "header":
        file.write_bytes(content[:8] + b"[" * 20 + content[28:])
    elif cut == "hole":  # offsets that skip bytes of the data
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        first = min((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        header.pop(first)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    else:
        assert isinstance(cut, int)
        file.write_bytes(content[:cut])
    for act in (load_causal_lm, lambda folder: convert(folder, tmp_path / "target", "posttrain")):
        with pytest.raises(UserError) as error:
            act(official)
        assert file.name in str(error.value) and "damaged" in str(error.value) and "\n" not in str(error.value)


def test_the_command(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "sub" / "ours"
    assert main(["convert", str(official), str(target), "--to", "posttrain"]) == 0
    count = len(stored_tensors(target))
    assert f"done: {count} tensors" in capsys.readouterr().out
    assert main(["convert", str(official), str(target), "--to", "native"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "b"), "--to", "native"]) == 2
    assert "config.json is missing" in capsys.readouterr().err
    assert main(["convert", str(official), str(tmp_path / "b"), "--to", "other"]) == 2


def test_an_official_file_without_sizes_fails_by_its_tensors(tmp_path: Path, official: Path) -> None:
    fields = official_config()
    del fields["hidden_size"]
    (official / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="model.embed_tokens.weight is"):
        convert(official, tmp_path / "target", "posttrain")


def test_packed_documents_score_alike_after_conversion(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "ours", "posttrain")
    tokens, layout = packed(random_tokens(1), random_tokens(64), random_tokens(65))
    with torch.no_grad():
        first, second = load_causal_lm(official), load_causal_lm(tmp_path / "ours")
        assert first(tokens, layout=layout).logits.equal(second(tokens, layout=layout).logits)
