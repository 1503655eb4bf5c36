"""Transformers' own MiniMax with the weights of one of ours.

Two faults of its code matter here (transformers 5.19): it turns every dimension of a head, whatever `rotary_dim` says, and
its lightning layers ignore where a packed document begins. A third difference is the slopes, at the seventh digit: it divides
a layer's index by L - 1 + 1e-5.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from posttrain.model.modeling import MiniMaxText01ForCausalLM


def native_config(config: Any) -> MiniMaxConfig:
    """The same sizes and factors under transformers' names; rotary_dim has none."""
    return MiniMaxConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        num_local_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        layer_types=["full_attention" if kind else "linear_attention" for kind in config.attn_type_list],
        linear_attn_alpha_factor=config.layernorm_linear_attention_alpha,
        linear_attn_beta_factor=config.layernorm_linear_attention_beta,
        full_attn_alpha_factor=config.layernorm_full_attention_alpha,
        full_attn_beta_factor=config.layernorm_full_attention_beta,
        mlp_alpha_factor=config.layernorm_mlp_alpha,
        mlp_beta_factor=config.layernorm_mlp_beta,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def native_model(model: MiniMaxText01ForCausalLM) -> MiniMaxForCausalLM:
    """Transformers' class holding the weights of `model`, in its type; only its derived buffers are its own."""
    native = MiniMaxForCausalLM(native_config(model.config)).to(model.dtype)
    weights = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in model.state_dict().items()}
    missing, unexpected = native.load_state_dict(weights, strict=False)
    buffers = {name for name, _ in native.named_buffers()}
    assert not unexpected and set(missing) <= buffers, (missing, unexpected)
    return native.train(model.training)


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference as a share of the largest value of theirs."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
