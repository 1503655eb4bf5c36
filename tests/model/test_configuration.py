"""One configuration class for the files of MiniMax-Text-01, MiniMax-M1 and transformers' minimax."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, MiniMaxConfig

import posttrain.model.registration  # noqa: F401
from posttrain.config.errors import UserError
from posttrain.model.config_fields import canonical
from posttrain.model.configuration import MiniMaxM1Config, MiniMaxText01Config
from posttrain.model.loading import empty_model, load_config
from posttrain.model.presets import PRESETS, preset
from tests.model.schemes import SIZES, official_config, write_official
from tests.model.small import random_config, small_config


@pytest.mark.parametrize("model_type", ["minimax_text_01", "minimax_m1"])
def test_a_released_file_is_read_and_written_again(model_type: str, tmp_path: Path) -> None:
    fields = official_config(model_type)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for config in (load_config(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(config) is (MiniMaxM1Config if model_type == "minimax_m1" else MiniMaxText01Config)
        assert config.router_aux_loss_coef == 0.001 and config.output_router_logits is False
        written = config.to_official()
        # Code beside the file is not ours to point at; transformers drops what belongs to generation.
        gone = {"auto_map", "use_cache", "transformers_version"}
        assert {name: written[name] for name in fields if name not in gone} == {
            name: fields[name] for name in fields if name not in gone
        }
    assert config.to_official("minimax_text_01")["architectures"] == ["MiniMaxText01ForCausalLM"]
    assert config.to_official("minimax_m1")["model_type"] == "minimax_m1"


def test_the_fields_of_the_released_model_are_our_defaults() -> None:
    config = preset("text-01")
    assert config.layernorm_mlp_alpha == 3.5565588200778455
    assert [layer for layer, kind in enumerate(config.attn_type_list) if kind] == [7, 15, 23, 31, 39, 47, 55, 63, 71, 79]
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "head_dim", "rotary_dim", "rope_theta")}
    assert sizes == {"vocab_size": 200_064, "hidden_size": 6144, "head_dim": 128, "rotary_dim": 64, "rope_theta": 10_000_000}
    assert config.to_official()["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("seed", range(20))
def test_what_transformers_makes_of_our_native_file_says_the_same(seed: int) -> None:
    config = random_config(seed)
    config.rotary_dim = config.head_dim
    if config.num_attention_heads & (config.num_attention_heads - 1) and 0 in config.attn_type_list:
        with pytest.raises(ValueError, match="power of two"):
            config.to_native()
        return
    theirs = MiniMaxConfig.from_dict(config.to_native())
    assert theirs.layer_types == [("linear_attention", "full_attention")[kind] for kind in config.attn_type_list]
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.linear_attn_alpha_factor == config.layernorm_linear_attention_alpha
    assert theirs.full_attn_beta_factor == config.layernorm_full_attention_beta
    back = MiniMaxText01Config.from_dict(json.loads(theirs.to_json_string()))
    mine, again = config.to_dict(), back.to_dict()
    assert {name: again[name] for name in mine if name != "architectures"} == {
        name: value for name, value in mine.items() if name != "architectures"
    }


def test_a_native_file_that_says_nothing_means_transformers_defaults() -> None:
    theirs, ours = MiniMaxConfig(), MiniMaxText01Config.from_dict({"model_type": "minimax"})
    for name in SIZES:
        if name not in ("rotary_dim", "rope_theta", "attn_type_list", "head_dim"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == ours.rotary_dim == 4096 // 32 and ours.rope_theta == 1_000_000.0
    assert ours.attn_type_list == [int(kind == "full_attention") for kind in theirs.layer_types]
    assert ours.layernorm_mlp_alpha == theirs.mlp_alpha_factor == 1


@pytest.mark.parametrize(
    ("rope", "theta", "dim"),
    [
        ({"rope_theta": 5e6}, 5e6, 8),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, 5e6, 8),
        ({"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}}, 5e6, 4),
        ({"rope_parameters": {"rope_theta": 5e6}, "rotary_dim": 4}, 5e6, 4),
        ({"rope_theta": 5e6, "rope_scaling": None, "partial_rotary_factor": 0.25}, 5e6, 2),
        ({"rope_scaling": {"type": "default"}}, 1e6, 8),
    ],
)
def test_rotary_settings_are_found_wherever_they_stand(rope: dict[str, Any], theta: float, dim: int) -> None:
    config = MiniMaxText01Config.from_dict({"model_type": "minimax", "hidden_size": 32, "num_attention_heads": 4, **rope, **KV})
    assert (config.rope_theta, config.rotary_dim) == (theta, dim)


KV = {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"postnorm": False}, "postnorm = False"),
        ({"shared_intermediate_size": 4096}, "shared_intermediate_size = 4096"),
        ({"shared_intermediate_size": [0, 8]}, "shared_intermediate_size = 8"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "'linear'"),
        ({"rope_parameters": {"rope_theta": 1e5}}, "rope_theta is given several times"),
        ({"partial_rotary_factor": 0.5}, "rotary_dim is given several times"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"layer_types": ["full_attention"] * 3}, "disagree"),
        ({"attn_type_list": None, "layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number"),
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"model_type": "llama"}, "expected 'minimax_text_01'"),
        ({"model_type": "minimax", "num_attention_heads": 6}, "power of two"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name_in_one_line(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(official_config(**{"model_type": "minimax_text_01", **change})))
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    assert part in str(error.value) and "config.json" in str(error.value) and "\n" not in str(error.value)


def test_values_that_mean_nothing_are_accepted() -> None:
    config = MiniMaxText01Config.from_dict(official_config(shared_intermediate_size=[0], rope_scaling=None, attention_bias=False))
    assert config.vocab_size == 41


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rotary_dim": 4}, "rotary_dim 4 of head_dim 8"),
        ({"rotary_dim": 8, "num_attention_heads": 6}, "power of two"),
        ({"rotary_dim": 8, "lightning_norm_eps": 1e-5}, "lightning_norm_eps"),
    ],
)
def test_what_transformers_would_compute_otherwise_is_not_written_for_it(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        small_config(**changes).to_native()


def test_an_inner_epsilon_of_our_own_is_not_written_as_official() -> None:
    with pytest.raises(ValueError, match="lightning_norm_eps"):
        small_config(lightning_norm_eps=1e-5).to_official()
    with pytest.raises(ValueError, match="model_type"):
        small_config().to_official("llama")


def test_a_configuration_is_made_under_official_names_alone() -> None:
    with pytest.raises(ValueError, match="layer_types"):
        small_config(layer_types=["full_attention"] * 3)
    with pytest.raises(ValueError, match="postnorm"):
        small_config(postnorm=False)


def test_reading_leaves_the_callers_fields_alone() -> None:
    fields = official_config(rope_parameters={"rope_theta": 10_000.0}, layer_types=None)
    before = json.dumps(fields)
    canonical(fields)
    assert json.dumps(fields) == before
    assert MiniMaxText01Config.from_dict(canonical(fields)).to_dict() == MiniMaxText01Config.from_dict(fields).to_dict()


def test_a_residual_factor_of_zero_is_kept() -> None:
    assert small_config(layernorm_mlp_alpha=0.0).layernorm_mlp_alpha == 0.0


def test_nothing_is_said_of_an_unknown_model_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_official(tmp_path / "model")
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        AutoConfig.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        load_config(folder)
    finally:
        library.removeHandler(caplog.handler)
    assert "to instantiate a model of type" not in caplog.text


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny", 386_112),
        ("50m", 45_669_248),
        ("small", None),
        ("period", None),
        ("text-01", 456_089_655_296),
        ("m1", 456_089_655_296),
    ],
)
def test_presets_have_their_sizes(name: str, count: int | None) -> None:
    config = preset(name)
    model = empty_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count is None or total == count
    if name == "small":
        assert 0.4e9 < total < 0.6e9 and sum(config.attn_type_list) * 8 == config.num_hidden_layers
    if name == "period":
        assert config.hidden_size == 6144 and config.attn_type_list == [0] * 7 + [1]
        assert config.layernorm_mlp_alpha == preset("text-01").layernorm_mlp_alpha
    gates = {parameter.dtype for parameter_name, parameter in model.named_parameters() if ".gate.weight" in parameter_name}
    assert gates == {torch.float32}
    assert preset(name) is not config and set(PRESETS) >= {name}


def test_an_unknown_preset_is_a_line() -> None:
    with pytest.raises(UserError, match="did you mean 'small'"):
        preset("smal")
