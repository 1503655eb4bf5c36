"""Chunked lightning attention in torch: the path of every device without a kernel of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from posttrain.kernels.lightning.plan import ChunkPlan, chunk_plan


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    lengths: Sequence[int],
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal linear attention with per-head decay over packed documents; differentiable.

    o_t = sum_{j <= t} exp(-s (t - j)) (q_t . k_j) v_j inside a document, plus exp(-s (t + 1)) S_0 q_t from its initial
    state. No scale, no softmax. Exponents are never positive, so nothing overflows.

    Args:
        q, k, v: [T, H, D], any float type; computed in fp32, in fp64 where `v` is.
        slopes: decay rates s >= 0, [H], fp32 or fp64.
        lengths: tokens of each document, on the host; they add up to T.
        initial_state: [N, H, V, K] or None for zeros.
        output_final_state: also return the states after the last token, [N, H, V, K].

    Returns:
        Outputs [T, H, V] in the type of `v`, and the final states in the compute type, or None.

    Raises:
        ValueError: `lengths` do not add up to T.

    Source: MiniMax-01 paper section 2.2.1 and algorithm 1, with the decay of the released modelling code.
    """
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"document lengths add up to {sum(lengths)}, but there are {q.shape[0]} tokens")
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    plan = chunk_plan(lengths, q.device)
    qc, kc, vc = (_to_chunks(x.to(compute), plan) for x in (q, k, v))
    slope = slopes.to(compute)[:, None]
    row = torch.arange(plan.chunk, device=q.device, dtype=compute)
    gap = row[:, None] - row[None, :]
    mask = torch.where(gap >= 0, torch.exp(-slope[:, :, None] * gap.clamp(min=0)), 0.0)
    out = ((qc @ kc.transpose(-1, -2)) * mask) @ vc

    final = None
    if len(plan.step_sizes) > 1 or initial_state is not None or output_final_state:
        rows = plan.rows.to(compute)
        age = (rows[:, None] - 1 - row[None, :]).clamp(min=0)  # padded rows of k are zero, their factor is irrelevant
        aged_keys = kc * torch.exp(-slope[None] * age[:, None, :])[..., None]
        added = vc.transpose(-1, -2) @ aged_keys
        before, final = _scan(added, torch.exp(-slope[None, :, :, None] * rows[:, None, None, None]), plan, initial_state)
        decayed_queries = qc * torch.exp(-slope * (row + 1))[None, ..., None]
        out = out + decayed_queries @ before.transpose(-1, -2)
    return _FromChunks.apply(out, plan).to(v.dtype), final if output_final_state else None


def lightning_decode_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token for each of B sequences: S <- exp(-s) S + v k^T in place, and return S q.

    Args:
        q, k, v: [B, H, D].
        slopes: [H].
        state: [B, H, V, K], fp32 or fp64, contiguous; overwritten.

    Returns:
        [B, H, V] in the type of `v`.
    """
    batch, heads, values, keys = state.shape
    state.mul_(torch.exp(-slopes.to(state.dtype))[None, :, None, None])
    flat = state.view(batch * heads, values, keys)
    flat.baddbmm_(v.reshape(-1, values, 1).to(state.dtype), k.reshape(-1, 1, keys).to(state.dtype))
    return torch.bmm(flat, q.reshape(-1, keys, 1).to(state.dtype)).view(batch, heads, values).to(v.dtype)


def _to_chunks(x: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """[T, H, D] -> [M, H, C, D], zero where a chunk has no token."""
    return _ToChunks.apply(x, plan)


def _laid_out(x: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    if plan.in_order:
        rows = x
    elif len(x):
        rows = x[plan.gather.flatten().clamp(max=len(x) - 1)].index_fill_(0, plan.padding, 0.0)
    else:
        rows = x.new_zeros(plan.gather.numel(), *x.shape[1:])
    return rows.view(*plan.gather.shape, *x.shape[1:]).transpose(1, 2)


def _taken_back(chunks: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    rows = chunks.transpose(1, 2).reshape(-1, chunks.shape[1], chunks.shape[3])
    return rows if plan.in_order else rows[plan.scatter]


class _ToChunks(torch.autograd.Function):
    """Tokens to chunks. Each is the other's inverse, so a gradient is gathered, where torch's own indexing would scatter it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
        ctx.plan = plan
        return _laid_out(x, plan).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _taken_back(grads[0], ctx.plan), None


class _FromChunks(torch.autograd.Function):
    """Chunks to tokens, see `_ToChunks`."""

    @staticmethod
    def forward(ctx: Any, chunks: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
        ctx.plan = plan
        return _taken_back(chunks, plan)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _laid_out(grads[0].contiguous(), ctx.plan), None


def _scan(
    added: torch.Tensor, decay: torch.Tensor, plan: ChunkPlan, initial_state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """States before every chunk [M, H, V, K] and after every document [N, H, V, K].

    One step of the loop advances all documents by a chunk; documents that ended keep their state.
    """
    num_documents = len(plan.num_chunks)
    if initial_state is None:
        state = added.new_zeros(num_documents, *added.shape[1:])
    else:
        state = initial_state.to(added.dtype)[plan.order]
    before, ended, offset = [], [], 0
    for size in plan.step_sizes:
        ended.append(state[size:])
        state = state[:size]
        before.append(state)
        state = decay[offset : offset + size] * state + added[offset : offset + size]
        offset += size
    # Documents that ended later come first in `order`: put the pieces together from the last step to the first.
    final_sorted = torch.cat([state, *reversed(ended)])
    inverse = torch.empty_like(plan.order)
    inverse[plan.order] = torch.arange(num_documents, device=plan.order.device)
    return (torch.cat(before) if before else added), final_sorted[inverse]
