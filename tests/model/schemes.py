"""Small checkpoints of every kind, written by something other than the converter: safetensors itself and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from posttrain.data.tokenizer import train_tokenizer
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from tests.model.small import small_config, small_model

# What MiniMax-M1's config.json holds beside the sizes.
OFFICIAL_REST: dict[str, Any] = {
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"},
    "hidden_act": "silu",
    "output_router_logits": False,
    "postnorm": True,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
}


def official_config(model_type: str = "minimax_m1", **changes: Any) -> dict[str, Any]:
    """config.json of a small model with every field of MiniMax-M1's."""
    own = small_config(rotary_dim=8).to_dict()
    sizes = {name: own[name] for name in own if name in SIZES or name.startswith("layernorm_")}
    name = "MiniMaxM1ForCausalLM" if model_type == "minimax_m1" else "MiniMaxText01ForCausalLM"
    return {**OFFICIAL_REST, **sizes, "model_type": model_type, "architectures": [name], **changes}


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rotary_dim",
    "rope_theta",
    "max_position_embeddings",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "attn_type_list",
    "rms_norm_eps",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
)


def official_tensors(model: MiniMaxText01ForCausalLM, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A model's tensors under the released names, in the released types: router gates fp32, everything else `dtype`."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor.to(dtype)):
                gate, up = both.chunk(2)
                found[name.replace("gate_up_proj", f"{expert}.w1.weight")] = gate.clone()
                found[name.replace("gate_up_proj", f"{expert}.w3.weight")] = up.clone()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor.to(dtype)):
                found[name.replace("down_proj", f"{expert}.w2.weight")] = down.clone()
        else:
            found[name] = tensor.float() if name.endswith("moe.gate.weight") else tensor.to(dtype)
    return found


def write_official(folder: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 3, **changes: Any) -> Path:
    """A released-style checkpoint with tokenizer, in several files."""
    folder.mkdir(parents=True)
    tensors = official_tensors(small_model(rotary_dim=8), dtype)
    names = sorted(tensors)
    weight_map = {name: f"model-{number % shards:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(names)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(official_config(**changes)))
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.7, "do_sample": true}')
    (folder / "modeling_minimax_m1.py").write_text("raise SystemExit")
    (folder / "LICENSE-MODEL").write_text("terms")
    train_tokenizer(["1"], 270).save_pretrained(folder)
    return folder


def native_model(config: MiniMaxText01Config, seed: int = 0) -> MiniMaxForCausalLM:
    """transformers' own model of the same sizes."""
    fields = config.to_native()
    torch.manual_seed(seed)
    return MiniMaxForCausalLM(MiniMaxConfig.from_dict(fields)).eval()


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by safetensors itself."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether names, types, shapes and bits are the same."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].reshape(-1).view(torch.uint8).equal(second[name].reshape(-1).view(torch.uint8))
        for name in first
    )
