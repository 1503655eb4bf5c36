"""What is said of a checkpoint without torch is what the model itself says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import AutoTokenizer

from posttrain.config.errors import UserError
from posttrain.config.schema import ModelSection
from posttrain.data.tokenizer import train_tokenizer
from posttrain.model import loading
from posttrain.model.checkpoint_files import check_checkpoint, config_fields, expected_shapes, read_shapes
from posttrain.model.loading import new_model, save_model
from posttrain.model.modeling import MiniMaxText01ForSequenceClassification
from tests.model.schemes import write_official

SMALL: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 20, "head_dim": 6, "rotary_dim": 4}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_hidden_layers": 1, "softmax_every": 1},
        {"num_hidden_layers": 9, "softmax_every": 8, "num_attention_heads": 6, "num_key_value_heads": 3},
        {"num_local_experts": 3, "num_experts_per_tok": 1},
        {"head_dim": 128, "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 32},  # the released sizes
    ],
    ids=str,
)
def test_the_shapes_expected_and_read_are_those_of_the_model(
    sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model(ModelSection(**{**SMALL, **sizes}), 70, 1)
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(loading, "SHARD_BYTES", 100_000)
    tokenizer = train_tokenizer(["1"], 270)
    save_model(model, tokenizer, tmp_path)
    assert expected_shapes(config_fields(tmp_path)) == own
    assert read_shapes(tmp_path) == own
    check_checkpoint(tmp_path)


def test_a_configuration_that_leaves_sizes_out_leaves_shapes_to_the_loader(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimax_text_01", "hidden_size": 8}))
    assert expected_shapes(config_fields(tmp_path)) is None
    model = new_model(ModelSection(**SMALL), 70, 1)
    save_file(model.state_dict(), tmp_path / loading.WEIGHTS)
    check_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [{"num_hidden_layers": "4"}, {"attn_type_list": [0]}, {"attn_type_list": "x"}])
def test_sizes_that_are_none_are_left_to_the_loader(change: dict[str, Any]) -> None:
    fields = new_model(ModelSection(**SMALL), 70, 1).config.to_dict()
    assert expected_shapes(fields) is not None
    assert expected_shapes({**fields, **change}) is None


def test_a_reward_model_is_no_language_model(tmp_path: Path) -> None:
    config = new_model(ModelSection(**SMALL), 70, 1).config
    config.num_labels = 1
    save_model(MiniMaxText01ForSequenceClassification(config), train_tokenizer(["1"], 270), tmp_path)
    with pytest.raises(UserError, match=r"missing lm_head.weight \[70, 24\]; extra score.weight \[1, 24\]"):
        check_checkpoint(tmp_path)


def test_a_chat_template_is_found_where_transformers_finds_it(tmp_path: Path) -> None:
    from posttrain.data.tokenizer_files import check_tokenizer_files

    train_tokenizer(["1"], 270).save_pretrained(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink()

    def found() -> bool:
        try:
            check_tokenizer_files(tmp_path)
        except UserError:
            return False
        return True

    def agreed() -> bool:
        has = bool(AutoTokenizer.from_pretrained(str(tmp_path)).chat_template)
        assert found() == has
        return has

    assert not agreed()
    for value in (template, [{"name": "default", "template": template}], ""):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": value}))
        assert agreed() == bool(value)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(template)
    assert agreed()


def test_released_files_are_checked_without_torch(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "source")
    code = f"""
import sys
from posttrain.model.checkpoint_files import check_checkpoint, config_fields
check_checkpoint({str(folder)!r})
print(config_fields({str(folder)!r})["model_type"], "torch" in sys.modules, "transformers" in sys.modules)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["minimax_m1", "False", "False"]
