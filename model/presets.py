"""Configurations by name, from a model for tests to the released ones."""

from __future__ import annotations

from collections.abc import Callable

from posttrain.config.errors import UserError
from posttrain.config.names import suggest
from posttrain.model.configuration import MiniMaxM1Config, MiniMaxText01Config


def preset(name: str) -> MiniMaxText01Config:
    """A new configuration.

    Args:
        name: `tiny` (0.4 M parameters, the tiny recipe's), `50m` (46 M, for a CPU), `small` (0.55 B: the released structure,
            trains on one 80 GB GPU), `period` (one period of eight real-size layers, 48 B), `text-01` or `m1` (the released
            sizes, 456 B).

    Raises:
        UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'", instead=suggest(name, list(PRESETS)))
    return PRESETS[name]()


def _tiny() -> MiniMaxText01Config:
    return MiniMaxText01Config(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        rope_theta=10_000.0,
        max_position_embeddings=4096,
        intermediate_size=128,
        num_local_experts=4,
        attn_type_list=[0, 1],
    )


def _fifty_million() -> MiniMaxText01Config:
    return MiniMaxText01Config(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=48,
        rotary_dim=24,
        rope_theta=10_000.0,
        max_position_embeddings=65_536,
        intermediate_size=384,
        num_local_experts=16,
    )


def _small() -> MiniMaxText01Config:
    return MiniMaxText01Config(
        vocab_size=32_768,
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        rotary_dim=64,
        rope_theta=10_000.0,
        max_position_embeddings=131_072,
        intermediate_size=512,
        num_local_experts=16,
        dtype="bfloat16",
    )


def _period() -> MiniMaxText01Config:
    # Residual factors of the whole model: a period is a cut out of it.
    whole = MiniMaxText01Config()
    return MiniMaxText01Config(
        num_hidden_layers=8,
        layernorm_linear_attention_alpha=whole.layernorm_linear_attention_alpha,
        layernorm_full_attention_alpha=whole.layernorm_full_attention_alpha,
        layernorm_mlp_alpha=whole.layernorm_mlp_alpha,
        dtype="bfloat16",
    )


PRESETS: dict[str, Callable[[], MiniMaxText01Config]] = {
    "tiny": _tiny,
    "50m": _fifty_million,
    "small": _small,
    "period": _period,
    "text-01": lambda: MiniMaxText01Config(dtype="bfloat16"),
    "m1": lambda: MiniMaxM1Config(dtype="bfloat16"),
}
