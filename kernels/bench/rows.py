"""What is compared: groups of rows, a row being one shape with its floor and its contestants."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUPS = {
    "forward": "Lightning attention, forward",
    "train": "Lightning attention, forward and backward",
    "packed": "Packed documents of random lengths",
    "decode": "Decoding, one token for each sequence",
    "verify": "Verification of draft tokens",
    "mixed": "Decodes and short prefills in one batch",
    "ends": "SiLU before, RMSNorm with gate after",
}
HEAD_DIM = 128
STATE_BYTES = 2 * 4 * HEAD_DIM * HEAD_DIM
"""One fp32 state read and written."""
FORWARD_BYTES, BACKWARD_BYTES = 8 * HEAD_DIM, 20 * HEAD_DIM
"""A token of a head in bf16: q, k, v read and o written; two sweeps more, k, v, do -> dq and q, k, v, do -> dk, dv."""
OURS = "ours"
LARGE_OFFSETS = 2**31  # elements of a tensor from which 32-bit offsets overflow


@dataclass(frozen=True)
class Row:
    """One shape.

    Attributes:
        group: one of GROUPS.
        case: what a person reads.
        contestants: who is measured, ours first.
        floor_bytes: bytes that must move; 0 where no time is measured.
        documents, tokens, heads: its sizes; `tokens` of each document, of all together in a packed row.
        train: with the backward pass.
        baseline: the contestant that ours is held against where it is no rival but another way of ours.
        compared: outputs of contestants are compared with those of ours.
    """

    group: str
    case: str
    contestants: tuple[str, ...]
    floor_bytes: float
    documents: int = 1
    tokens: int = 1
    heads: int = 64
    train: bool = False
    baseline: str | None = None
    compared: bool = False

    @property
    def elements(self) -> int:
        """Numbers in one of q, k, v, o."""
        return self.documents * self.tokens * self.heads * HEAD_DIM


def slopes_of(heads: int, device: str) -> torch.Tensor:
    """Decay rates of the first layer, fp32 [H]."""
    return torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)], device=device)


def normal(*shape: int, device: str) -> torch.Tensor:
    """Random bf16 numbers."""
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def backend_of(device: str) -> str:
    """The backend that is measured: the kernels, or on a CPU, where only the tests run it, the chunked path."""
    return "triton" if device == "cuda" else "torch"
