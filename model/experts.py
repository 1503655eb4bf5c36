"""Mixture of experts: fp32 router, dropless top-k dispatch, SwiGLU experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.layers import Float32Linear, full_precision
from posttrain.model.router import choose


class Experts(nn.Module):
    """E SwiGLU networks, fused: gate_up_proj [E, 2F, H] holds w1 (gate) above w3 (up), down_proj [E, H, F] is w2."""

    def __init__(self, config: MiniMaxText01Config) -> None:
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: torch.Tensor, shares: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        """sum_k shares[t, k] * expert_{routes[t, k]}(x[t]).

        Args:
            x: [T, H].
            shares: [T, k], fp32 or fp64; the sum is taken in their type.
            routes: int64 [T, k].

        Returns:
            [T, H] in the type of `x`; under autocast the products are in autocast's type.
        """
        inputs = (x, self.gate_up_proj, self.down_proj)
        if torch.is_autocast_enabled(x.device.type):
            inputs = tuple(tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in inputs)  # type: ignore[assignment]
        with full_precision(x):
            return _Mixture.apply(inputs[0], inputs[1], inputs[2], shares, routes).to(x.dtype)


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
        shares, routes = choose(logits, self.top_k, given)
        return self.experts(x, shares, routes), routes, logits


@dataclass(frozen=True)
class _Dispatch:
    """Pairs of a token and an expert, sorted by expert.

    Attributes:
        order: pair (token * k + choice) of every sorted row, int64 [P]; None where the pairs of one token stay as they lie.
        inverse: sorted row of every pair, int64 [P], or None likewise.
        groups: (expert, rows) of the experts that have any, on the host; empty where `ends` is given.
        ends: first row after each expert's, int32 [E] on the device, for grouped products, which wait for nothing.
    """

    order: torch.Tensor | None
    inverse: torch.Tensor | None
    groups: list[tuple[int, slice]]
    ends: torch.Tensor | None = None

    @classmethod
    def of(cls, routes: torch.Tensor, num_experts: int, grouped: bool) -> _Dispatch:
        if len(routes) == 1 and not grouped:
            return cls(None, None, [(expert, slice(row, row + 1)) for row, expert in enumerate(routes[0].tolist())])
        flat = routes.flatten()
        order = torch.sort(flat, stable=True).indices
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        if grouped:
            last = torch.arange(num_experts, device=flat.device)
            ends = torch.searchsorted(flat[order], last, right=True)  # bincount would wait for the device
            return cls(order, inverse, [], ends.to(torch.int32))
        groups, start = [], 0
        for expert, count in enumerate(torch.bincount(flat, minlength=num_experts).tolist()):
            if count:
                groups.append((expert, slice(start, start + count)))
            start += count
        return cls(order, inverse, groups)

    def products(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert's rows times its matrix, [P, A] and [E, A, B] -> [P, B]."""
        if self.ends is not None:
            return F.grouped_mm(rows, weights, offs=self.ends)
        out = rows.new_empty(len(rows), weights.shape[2])
        for expert, part in self.groups:
            torch.mm(rows[part], weights[expert], out=out[part])
        return out

    def gradients(self, left: torch.Tensor, right: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """left^T right over every expert's rows, [P, A] and [P, B] -> [E, A, B]; zero for an expert without rows."""
        if self.ends is not None:
            grad = F.grouped_mm(left.T, right, offs=self.ends)
            unused = self.ends == torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
            return grad.masked_fill_(unused[:, None, None], 0.0)  # grouped_mm does not promise to write them
        grad = torch.empty_like(like)
        chosen = {expert for expert, _ in self.groups}
        for expert in range(len(like)):
            if expert not in chosen:
                grad[expert].zero_()
        for expert, part in self.groups:
            torch.mm(left[part].T, right[part], out=grad[expert])
        return grad

    def spread(self, x: torch.Tensor, top_k: int) -> torch.Tensor:
        """[T, ...] of tokens -> [P, ...], sorted."""
        return x.expand(top_k, *x.shape[1:]) if self.order is None else x[self.order // top_k]

    def sort(self, pairs: torch.Tensor) -> torch.Tensor:
        """[T, k] of pairs -> [P], sorted."""
        return pairs.flatten() if self.order is None else pairs.flatten()[self.order]

    def unsort(self, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """[P, ...] sorted -> [T, k, ...]."""
        return (rows if self.inverse is None else rows[self.inverse]).view(*shape, *rows.shape[1:])


class _Mixture(torch.autograd.Function):
    """Dispatch, experts and weighted sum in one, with a backward pass written out.

    Taken apart into torch's own operations, the backward pass fills a tensor of all experts' size with zeros for each of
    them, and scatters where a gather does. The output of the down-projection is not kept: the gradient of a share is
    <dL/dy, y> = <dL/dy W2, activation>, whose factors the backward pass needs anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, shares: torch.Tensor, routes: torch.Tensor
    ) -> torch.Tensor:
        plan = _Dispatch.of(routes, len(gate_up), _can_group(x, gate_up, down))
        inner = plan.products(plan.spread(x, routes.shape[1]), gate_up.mT)
        gate, up = inner.chunk(2, dim=-1)
        out = plan.products(F.silu(gate).mul_(up), down.mT)
        ctx.save_for_backward(x, gate_up, down, shares, routes, inner)
        ctx.plan = plan
        pairs = plan.unsort(out, routes.shape).to(shares.dtype)
        return torch.bmm(shares[:, None], pairs).squeeze(1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate_up, down, shares, routes, inner = ctx.saved_tensors
        plan, top_k = ctx.plan, routes.shape[1]
        gate, up = inner.chunk(2, dim=-1)
        activation = F.silu(gate)
        grad_out = plan.spread(grads[0], top_k).contiguous()
        back = plan.products(grad_out, down)  # dL/dy W2, not yet weighted
        weight = plan.sort(shares)[:, None].to(x.dtype)
        grad_shares = None
        if ctx.needs_input_grad[3]:
            along = (back.to(shares.dtype) * (activation * up)).sum(dim=-1)
            grad_shares = plan.unsort(along, routes.shape)
        back.mul_(weight)
        grad_inner = torch.empty_like(inner)
        torch.mul(back, activation, out=grad_inner[:, gate.shape[1] :])
        grad_inner[:, : gate.shape[1]] = torch.ops.aten.silu_backward(back.mul_(up), gate)
        grad_gate_up = grad_down = grad_x = None
        if ctx.needs_input_grad[2]:
            grad_down = plan.gradients(grad_out, activation.mul_(up).mul_(weight), down)
        if ctx.needs_input_grad[1]:
            grad_gate_up = plan.gradients(grad_inner, plan.spread(x, top_k), gate_up)
        if ctx.needs_input_grad[0]:
            grad_x = plan.unsort(plan.products(grad_inner, gate_up), routes.shape).sum(dim=1)
        return grad_x, grad_gate_up, grad_down, grad_shares, None


def _can_group(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether torch's grouped product runs these: bf16 on a GPU, rows of all matrices at multiples of 16 bytes.

    Elsewhere a loop over experts is as fast, and on a CPU faster.
    """
    aligned = gate_up.shape[1] % 16 == 0 and down.shape[1] % 8 == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and len(x) > 0 and aligned
