"""Rows of what stands around the attention: SiLU on the projection, RMSNorm over all heads with the output gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from posttrain.kernels.bench.rows import BACKWARD_BYTES, FORWARD_BYTES, HEAD_DIM, OURS, Row, backend_of, normal, slopes_of
from posttrain.kernels.bench.timing import Prepared
from posttrain.kernels.lightning.gated_norm import gated_rms_norm
from posttrain.kernels.lightning.operator import lightning_attention_qkv

TOKENS = (8192, 32768)
EAGER = "torch"
NORM, SILU = "norm", "SiLU and attention"
EPSILON = 1e-5
# A token of a head in bf16: x, gate read, y written; and x, gate, dy read, dx, dgate written.
NORM_FORWARD_BYTES, NORM_BACKWARD_BYTES = 6 * HEAD_DIM, 10 * HEAD_DIM


def rows() -> list[Row]:
    """Every row of the group `ends`: each end alone with torch's functions as the rival, forward, and forward and backward."""
    return [
        Row(
            group="ends",
            case=f"{end}, {tokens:,} tokens, forward{' and backward' * train}",
            contestants=(OURS, EAGER),
            floor_bytes=tokens * 64 * (ahead + behind * train),
            tokens=tokens,
            train=train,
        )
        for end, ahead, behind in ((NORM, NORM_FORWARD_BYTES, NORM_BACKWARD_BYTES), (SILU, FORWARD_BYTES, BACKWARD_BYTES))
        for tokens in TOKENS
        for train in (False, True)
    ]


def prepare(row: Row, contestant: str, device: str) -> Prepared:
    """A contestant with inputs of its own; equal seeds give equal numbers to all. `torch` has SiLU before our attention."""
    return (_norm if row.case.startswith(NORM) else _silu)(row, contestant == EAGER, device)


def _norm(row: Row, eager: bool, device: str) -> Prepared:
    width = row.heads * HEAD_DIM
    x, gate, grad = (normal(row.tokens, width, device=device) for _ in range(3))
    weight = normal(width, device=device)
    backend = "torch" if eager else backend_of(device)
    tensors = [x, gate, weight]

    def forward() -> torch.Tensor:
        return gated_rms_norm(x, gate, weight, EPSILON, backend=backend)

    return _prepared(row, forward, tensors, grad)


def _silu(row: Row, eager: bool, device: str) -> Prepared:
    qkv = normal(row.tokens, row.heads, 3 * HEAD_DIM, device=device)
    grad = normal(row.tokens, row.heads, HEAD_DIM, device=device)
    slopes, backend = slopes_of(row.heads, device), backend_of(device)

    def forward() -> torch.Tensor:
        if eager:
            return lightning_attention_qkv(F.silu(qkv), slopes, backend=backend)
        return lightning_attention_qkv(qkv, slopes, activation="silu", backend=backend)

    return _prepared(row, forward, [qkv], grad)


def _prepared(row: Row, forward: Callable[[], torch.Tensor], tensors: list[torch.Tensor], grad: torch.Tensor) -> Prepared:
    if not row.train:
        return Prepared(forward, output=forward)
    for x in tensors:
        x.requires_grad_()

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), tensors, grad)

    return Prepared(both, output=lambda: both()[0])
