"""Mixture of experts: fp32 router, dropless top-k dispatch, SwiGLU experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.layers import Float32Linear
from posttrain.model.router import choose


class Experts(nn.Module):
    """E SwiGLU networks, fused: gate_up_proj [E, 2F, H] holds w1 (gate) above w3 (up), down_proj [E, H, F] is w2."""

    def __init__(self, config: MiniMaxText01Config) -> None:
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Rows of x [P, H], sorted by expert, `counts[e]` of them for expert e -> [P, H]."""
        outputs = []
        for expert, rows in enumerate(x.split(counts)):
            gate, up = F.linear(rows, self.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
        return torch.cat(outputs)


class MiniMaxText01SparseMoe(nn.Module):
    """sum_k p_k expert_k(x), p the softmax over all experts renormalised over the top k.

    Logits, softmax and weights are fp32, under autocast too. No token is dropped and nothing is summed by atomics, so the
    result does not depend on what else is in the batch.

    Source: MiniMax-01 paper section 2.1, equation 1.
    """

    def __init__(self, config: MiniMaxText01Config) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_local_experts
        self.gate = Float32Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: torch.Tensor, given: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, H] -> outputs [T, H], the chosen experts int64 [T, k] and the router's logits [T, E], fp32 or fp64.

        `given` replays experts [T, k], see `router.choose`.
        """
        logits = self.gate(x)
        weights, routes = choose(logits, self.top_k, given)
        order = torch.sort(routes.flatten(), stable=True).indices
        counts = torch.bincount(routes.flatten(), minlength=self.num_experts).tolist()
        expert_out = self.experts(x[order // self.top_k], counts)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        pairs = expert_out[inverse].view(*routes.shape, x.shape[1])
        return (pairs.to(weights.dtype) * weights[..., None]).sum(dim=1).to(x.dtype), routes, logits
