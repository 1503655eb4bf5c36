"""The model in fp64, written from the equations alone, one token and one expert at a time.

It shares no code with the model: it reads tensors by their names in a checkpoint and sizes by their names in
config.json. Differentiable, so that gradients can be compared as well.

Source: MiniMax-01 paper sections 2.1, 2.2 and 4.1, and the released modelling code where the paper is silent (slopes,
rotation of half a head, residual from the normalised value).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


def double(tensors: Tensors, requires_grad: bool = False) -> dict[str, torch.Tensor]:
    """Copies in fp64; with `requires_grad`, leaves that collect gradients."""
    return {name: tensor.detach().clone().double().requires_grad_(requires_grad) for name, tensor in tensors.items()}


def oracle(tensors: Tensors, config: Any, tokens: Sequence[int]) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """Logits fp64 [T, V] after every token of one document, and the experts of each token and layer, sorted."""
    x = tensors["model.embed_tokens.weight"][torch.tensor(tokens, dtype=torch.int64)]
    routes: list[list[list[int]]] = [[] for _ in tokens]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        x = rms_norm(x, tensors[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        if config.attn_type_list[layer] == 0:
            attended = lightning(tensors, prefix + "self_attn.", config, layer, x)
            alpha, beta = config.layernorm_linear_attention_alpha, config.layernorm_linear_attention_beta
        else:
            attended = softmax_attention(tensors, prefix + "self_attn.", config, x)
            alpha, beta = config.layernorm_full_attention_alpha, config.layernorm_full_attention_beta
        x = rms_norm(alpha * x + beta * attended, tensors[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        rows = []
        for t in range(len(tokens)):
            mixed, chosen = experts(tensors, prefix + "block_sparse_moe.", config, x[t])
            rows.append(mixed)
            routes[t].append(chosen)
        x = config.layernorm_mlp_alpha * x + config.layernorm_mlp_beta * torch.stack(rows)
    return rms_norm(x, tensors["model.norm.weight"], config.rms_norm_eps) @ tensors["lm_head.weight"].T, routes


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + e^-x)."""
    return x / (1 + torch.exp(-x))


def slopes(config: Any, layer: int) -> list[float]:
    """Decay rates: ALiBi's, with every second rate of the doubled series behind them, times 1 - l / (L - 1) + 1e-5."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    power = 1
    while 2 * power <= heads:
        power *= 2
    rates = [math.pow(2, -8 * h / power) for h in range(1, power + 1)]
    rates += [math.pow(2, -4 * h / power) for h in range(1, 2 * (heads - power), 2)]
    fall = 1 + 1e-5 if layers == 1 else 1 - layer / (layers - 1) + 1e-5
    return [rate * fall for rate in rates]


def lightning(tensors: Tensors, prefix: str, config: Any, layer: int, x: torch.Tensor) -> torch.Tensor:
    """KV_t = e^-s KV_{t-1} + k_t v_t^T; o_t = q_t KV_t; then norm over all heads, gate, projection."""
    d = config.head_dim
    projected = silu(x @ tensors[prefix + "qkv_proj.weight"].T)
    heads = []
    for h, rate in enumerate(slopes(config, layer)):
        mine = projected[:, 3 * d * h : 3 * d * (h + 1)]
        q, k, v = mine[:, :d], mine[:, d : 2 * d], mine[:, 2 * d :]
        state = x.new_zeros(d, d)
        rows = []
        for t in range(x.shape[0]):
            state = math.exp(-rate) * state + torch.outer(k[t], v[t])
            rows.append(q[t] @ state)
        heads.append(torch.stack(rows))
    normed = rms_norm(torch.cat(heads, dim=1), tensors[prefix + "norm.weight"], config.lightning_norm_eps)
    gate = 1 / (1 + torch.exp(-(x @ tensors[prefix + "output_gate.weight"].T)))
    return (gate * normed) @ tensors[prefix + "out_proj.weight"].T


def softmax_attention(tensors: Tensors, prefix: str, config: Any, x: torch.Tensor) -> torch.Tensor:
    """Causal attention, scale 1/sqrt(d), each group of query heads with one key/value head."""
    d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    q, k, v = (x @ tensors[f"{prefix}{name}_proj.weight"].T for name in "qkv")
    hidden = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
    heads = []
    for h in range(config.num_attention_heads):
        kv = h // group
        query = rotated(q[:, d * h : d * (h + 1)], config)
        key = rotated(k[:, d * kv : d * (kv + 1)], config)
        scores = (query @ key.T / math.sqrt(d)).masked_fill(hidden, -math.inf)
        weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        heads.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, d * kv : d * (kv + 1)])
    return torch.cat(heads, dim=1) @ tensors[prefix + "o_proj.weight"].T


def rotated(x: torch.Tensor, config: Any) -> torch.Tensor:
    """Dimensions i and i + r/2 of the first r turn by t * theta^(-2i/r); the others stay."""
    half = config.rotary_dim // 2
    columns = list(x.unbind(dim=1))
    for i in range(half):
        angle = torch.arange(x.shape[0], dtype=torch.float64) * config.rope_theta ** (-2 * i / config.rotary_dim)
        a, b = columns[i], columns[i + half]
        columns[i], columns[i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return torch.stack(columns, dim=1)


def experts(tensors: Tensors, prefix: str, config: Any, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """sum over the k likeliest experts of p_e w2(silu(w1 x) * w3 x), p a softmax over those k logits alone."""
    logits = tensors[prefix + "gate.weight"] @ x
    likelihood = logits.tolist()
    chosen = sorted(range(config.num_local_experts), key=lambda e: -likelihood[e])[: config.num_experts_per_tok]
    shares = torch.exp(logits[chosen] - logits[chosen].max())
    total = torch.zeros_like(x)
    for share, e in zip(shares / shares.sum(), chosen, strict=True):
        w1, w3 = tensors[prefix + "experts.gate_up_proj"][e].split(config.intermediate_size)
        total = total + share * (tensors[prefix + "experts.down_proj"][e] @ (silu(w1 @ x) * (w3 @ x)))
    return total, sorted(chosen)
