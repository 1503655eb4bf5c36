"""Inputs of lightning attention for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

# None, one, and all sides of the sizes of a chunk (16, 32, 64) and of two chunks.
EDGES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130]
LENGTHS = st.lists(st.sampled_from(EDGES) | st.integers(0, 140), min_size=1, max_size=6)


@dataclass(frozen=True)
class Inputs:
    """q, k, v [T, H, D], slopes [H], states [N, H, V, K], and the documents."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slopes: torch.Tensor
    states: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """[N + 1]."""
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def double(self) -> Inputs:
        """The same numbers in fp64, without gradients."""
        q, k, v, slopes, states = (x.detach().double() for x in (self.q, self.k, self.v, self.slopes, self.states))
        return Inputs(q, k, v, slopes, states, self.lengths)


def inputs(
    lengths: Sequence[int],
    heads: int = 2,
    keys: int = 4,
    values: int | None = None,
    slopes: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Normal numbers; slopes from fast to none where not given."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    total, values = sum(lengths), values or keys
    rates = list(slopes) if slopes is not None else [0.9 * 0.1**h for h in range(heads)]
    return Inputs(
        q=normal(total, heads, keys),
        k=normal(total, heads, keys),
        v=normal(total, heads, values),
        slopes=torch.tensor(rates, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        states=normal(len(lengths), heads, values, keys),
        lengths=tuple(lengths),
    )


def formula(data: Inputs, initial: bool) -> torch.Tensor:
    """o_t = sum_{j <= t} e^{-s (t - j)} (q_t . k_j) v_j + e^{-s (t + 1)} S_0 q_t, written out as matrices, fp64."""
    exact = data.double()
    q, k, v, slopes = exact.q, exact.k, exact.v, exact.slopes
    pieces = []
    offset = 0
    for document, length in enumerate(data.lengths):
        rows = slice(offset, offset + length)
        t = torch.arange(length, dtype=torch.float64)
        gap = t[:, None] - t[None, :]
        decay = torch.where(gap >= 0, torch.exp(-slopes[:, None, None] * gap.clamp(min=0)), 0.0)
        scores = torch.einsum("thd,jhd->htj", q[rows], k[rows]) * decay
        out = torch.einsum("htj,jhv->thv", scores, v[rows])
        if initial:
            aged = torch.exp(-slopes[None, :] * (t[:, None] + 1))
            out = out + aged[..., None] * torch.einsum("hvk,thk->thv", exact.states[document], q[rows])
        pieces.append(out)
        offset += length
    return torch.cat(pieces)
