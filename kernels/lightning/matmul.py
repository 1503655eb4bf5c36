"""Lightning attention by strided batched products of torch alone: any device, forward and backward, nothing read from it."""

from __future__ import annotations

import torch

BLOCK_SIZES = (256, 128, 64, 32)
"""Rows of a block, larger first: of those that pad equally little the largest has the fewest states."""


def least_padding(length: int) -> int:
    """The block size out of BLOCK_SIZES that fills a document of `length` tokens with the fewest empty rows."""
    return min(BLOCK_SIZES, key=lambda size: -length % size)


def lightning_matmul(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    typical_length: int,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal linear attention with per-head decay over packed documents; differentiable by torch.

    Documents are cut into blocks at places of a table that is made on the device: its size, T // block + N, is a bound that
    needs no lengths. States before the blocks are one product of all blocks' sums with a matrix of decays [M, M], zero between
    documents, so there is no loop over blocks and no launch per document. Memory: M states of H * V * K numbers.

    Args:
        q, k, v: [T, H, D], any float type; computed in fp32, in fp64 where `v` is.
        slopes: decay rates s >= 0, [H].
        cu_seqlens: offsets [N + 1] on the device of q.
        typical_length: of a document, on the host: the block is the one that pads this length least.
        initial_state: [N, H, V, K] or None for zeros.

    Returns:
        Outputs [T, H, V] in the type of `v`, and final states [N, H, V, K] in the compute type.

    Source: MiniMax-01 paper section 3.3 (strided batched products, blocks by least padding).
    """
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    total, heads, num = q.shape[0], q.shape[1], cu_seqlens.shape[0] - 1
    size = least_padding(typical_length)
    rate = slopes.to(compute)
    document, first, rows, place = _blocks(cu_seqlens, size, total // size + num)
    row = torch.arange(size, device=q.device)
    token = first[:, None] + row
    inside = row < rows[:, None]
    token = torch.where(inside, token, total)
    qb, kb, vb = (_gather(x.to(compute), token) for x in (q, k, v))

    gap = (row[:, None] - row[None, :]).to(compute)
    mask = torch.where(gap >= 0, torch.exp(-rate[:, None, None] * gap.clamp(min=0)), 0.0)
    scores = (qb @ kb.transpose(-1, -2)) * mask
    age = (rows[:, None] - 1 - row).clamp(min=0).to(compute)  # rows past the end hold zeros, whatever their factor
    aged = kb * torch.exp(-rate[None, :, None] * age[:, None, :])[..., None]
    added = (vb.transpose(-1, -2) @ aged).flatten(2).transpose(0, 1)  # [H, M, V * K]

    # What a block adds has aged, when a later block of its document begins, by the tokens between: begin - end >= 0.
    before = _weights(place, place + rows, rate, (document[:, None] == document) & (place[:, None] > place)) @ added
    length = cu_seqlens[1:] - cu_seqlens[:-1]
    mine = torch.arange(num, device=q.device)[:, None] == document
    final = _weights(length, place + rows, rate, mine) @ added
    if initial_state is not None:
        start = initial_state.to(compute).flatten(2).transpose(0, 1)  # [H, N, V * K]
        known = document.clamp(max=max(num - 1, 0))
        before = before + torch.exp(-rate[:, None] * place.to(compute))[..., None] * start[:, known]
        final = final + torch.exp(-rate[:, None] * length.to(compute))[..., None] * start
    shape = (heads, -1, v.shape[2], k.shape[2])
    states = before.view(shape).transpose(0, 1)
    reading = qb * torch.exp(-rate[:, None] * (row + 1).to(compute))[None, ..., None]
    out = torch.baddbmm((scores @ vb).flatten(0, 1), reading.flatten(0, 1), states.transpose(-1, -2).flatten(0, 1))
    out = out.view(-1, heads, size, v.shape[2]).transpose(1, 2).flatten(0, 1)
    # Rows of padding all go to one row past the end.
    flat = out.new_zeros(total + 1, *out.shape[1:]).index_copy(0, token.flatten(), out)[:total]
    return flat.to(v.dtype), final.view(shape).transpose(0, 1)


def _blocks(cu_seqlens: torch.Tensor, size: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each of `count` blocks: document (N for blocks too many), first token, tokens, and place in its document; int64."""
    offsets = cu_seqlens.long()
    length = offsets[1:] - offsets[:-1]
    ends = ((length + size - 1) // size).cumsum(0)
    block = torch.arange(count, device=offsets.device)
    document = torch.searchsorted(ends, block, right=True)
    known = document.clamp(max=max(len(length) - 1, 0))
    real = document < len(length)
    place = torch.where(real, (block - torch.where(known > 0, ends[known - 1], 0)) * size, 0)
    rows = torch.where(real, (length[known] - place).clamp(max=size), 0)
    return document, torch.where(real, offsets[known] + place, 0), rows, place


def _gather(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> [M, H, block, D]; token T is zeros."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[token].transpose(1, 2)


def _weights(begin: torch.Tensor, end: torch.Tensor, rate: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """exp(-s (begin - end)) where `where`, else 0; [H, len(begin), len(end)]."""
    gap = (begin[:, None] - end[None, :]).clamp(min=0).to(rate.dtype)
    return torch.where(where, torch.exp(-rate[:, None, None] * gap), 0.0)
