"""Models small enough for tests, of every shape that the code treats differently."""

from __future__ import annotations

import random
from typing import Any

import torch

from posttrain.data.layout import SequenceLayout
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.modeling import MiniMaxText01ForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096,
    "attn_type_list": [0, 1, 0],
    "intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.25,
}


def small_config(**changes: Any) -> MiniMaxText01Config:
    """Lightning, softmax, lightning; four heads, four experts."""
    return MiniMaxText01Config(**{**SMALL, **changes})


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> MiniMaxText01ForCausalLM:
    """A model of `small_config` with norms that are not all ones."""
    torch.manual_seed(seed)
    model = MiniMaxText01ForCausalLM(small_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def random_config(seed: int) -> MiniMaxText01Config:
    """Layer mix, heads, groups, rotary width, experts and residual factors drawn from the seed."""
    draw = random.Random(seed)
    layers = draw.choice([1, 2, 3, 4])
    kv_heads = draw.choice([1, 2, 3])
    head_dim = draw.choice([4, 6, 8, 12])
    num_experts = draw.choice([1, 2, 3, 5, 8])
    factors = {
        f"layernorm_{part}_{factor}": draw.uniform(0.5, 2.0)
        for part in ("linear_attention", "full_attention", "mlp")
        for factor in ("alpha", "beta")
    }
    return small_config(
        vocab_size=draw.choice([17, 40]),
        hidden_size=draw.choice([12, 16, 32]),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw.choice([1, 2, 3]),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=draw.choice([r for r in (2, 4, 6, 8, 12) if r <= head_dim]),
        rope_theta=draw.choice([100.0, 10_000.0, 10_000_000.0]),
        attn_type_list=[draw.choice([0, 0, 1]) for _ in range(layers)],
        intermediate_size=draw.choice([8, 20]),
        num_local_experts=num_experts,
        num_experts_per_tok=draw.randint(1, num_experts),
        **(factors if draw.random() < 0.5 else {}),
    )


def random_tokens(length: int, vocab_size: int = 41, seed: int = 0) -> torch.Tensor:
    """[length] ids."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(1000 + 31 * seed + length))


def packed(*documents: torch.Tensor) -> tuple[torch.Tensor, SequenceLayout]:
    """[1, T] ids and their layout."""
    return torch.cat(documents)[None], SequenceLayout.from_lengths([len(document) for document in documents])
