"""Which rows of a packed batch make which chunk: computed once a layout, used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

CHUNK_SIZES = (16, 32, 64)
"""Rows of a chunk. Short documents take the smallest chunk that holds them, so that little is padded."""


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of documents, ordered by step: first every document's first chunk, then the second ones, ...

    Documents are ordered by falling number of chunks, so those active in a step are a prefix of the ones before.

    Attributes:
        chunk: rows of a chunk, C.
        gather: token of every chunk row, [M, C]; T (one past the end) marks padding.
        scatter: row in the flattened [M * C] of every token, [T].
        rows: tokens in every chunk, [M].
        step_sizes: chunks in every step, on the host.
        order: document of every position in the falling order, [N].
        num_chunks: chunks of every document, in the order of the batch, on the host.
        padding: flattened chunk rows without a token.
        in_order: chunk rows are the tokens as they lie, none missing and none added.
    """

    chunk: int
    gather: torch.Tensor
    scatter: torch.Tensor
    rows: torch.Tensor
    step_sizes: tuple[int, ...]
    order: torch.Tensor
    num_chunks: tuple[int, ...]
    padding: torch.Tensor
    in_order: bool


def chunk_plan(lengths: Sequence[int], device: torch.device) -> ChunkPlan:
    """Plan for documents of the given lengths (0 is allowed); the last few plans are remembered."""
    return _chunk_plan(tuple(lengths), str(device))


# Remembered plans serve training too, which refuses index tensors made in inference mode.
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _chunk_plan(lengths: tuple[int, ...], device: str) -> ChunkPlan:
    longest = max(lengths, default=0)
    size = next((c for c in CHUNK_SIZES if c >= longest), CHUNK_SIZES[-1])
    length = torch.tensor(lengths, dtype=torch.int64)
    start = length.cumsum(0) - length
    chunks = (length + size - 1) // size
    order = torch.sort(chunks, descending=True, stable=True).indices
    step_sizes, firsts, counts = [], [], []
    for step in range(int(chunks.max()) if len(lengths) else 0):
        active = order[: int((chunks > step).sum())]
        step_sizes.append(len(active))
        firsts.append(start[active] + step * size)
        counts.append((length[active] - step * size).clamp(max=size))
    first = torch.cat(firsts) if firsts else torch.zeros(0, dtype=torch.int64)
    rows = torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64)
    offset = torch.arange(size)
    inside = offset[None, :] < rows[:, None]
    total = int(length.sum())
    gather = torch.where(inside, first[:, None] + offset[None, :], total)
    scatter = torch.empty(total, dtype=torch.int64)
    scatter[gather[inside]] = inside.flatten().nonzero().flatten()
    return ChunkPlan(
        chunk=size,
        gather=gather.to(device),
        scatter=scatter.to(device),
        rows=rows.to(device),
        step_sizes=tuple(step_sizes),
        order=order.to(device),
        num_chunks=tuple(chunks.tolist()),
        padding=(~inside).flatten().nonzero().flatten().to(device),
        in_order=bool(inside.all()) and bool((scatter[1:] > scatter[:-1]).all()),
    )
