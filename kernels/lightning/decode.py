"""The Triton kernel of one decoding step, and its launch: one read and one write of the states, nothing else of size."""
# mypy: allow-untyped-defs
# No `from __future__ import annotations`: Triton reads the annotations of arguments.

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 16, 4
"""Rows of a state that a program holds, and its warps: of 16, 32 and 64 rows the fastest at every batch from 1 to 256."""


@triton.jit
def _activated(x, SILU: tl.constexpr):
    """In fp32; with SILU its SiLU, rounded to the type of x as a pass over memory would."""
    value = x.to(tl.float32)
    if SILU:
        value = (value * tl.sigmoid(value)).to(x.dtype).to(tl.float32)
    return value


@triton.jit
def decode_kernel(
    q, k, v, slopes, pool, slots, out,
    q_b, q_h, k_b, k_h, v_b, v_h, heads,
    D: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """S <- exp(-s) S + v k^T in place, out = S q; one program: one sequence, one head, BLOCK rows of its state.

    With SILU q, k and v are SiLU of what is loaded.
    """
    pid = tl.program_id(0)
    piece = pid % (D // BLOCK)
    rest = pid // (D // BLOCK)
    head = rest % heads
    sequence = (rest // heads).to(tl.int64)
    place = sequence
    if SLOTS:
        place = tl.load(slots + sequence).to(tl.int64)
    column = tl.arange(0, D)
    row = piece * BLOCK + tl.arange(0, BLOCK)
    inside = (place >= 0) & (row >= 0)
    at = pool + (place * heads + head) * (D * D) + row[:, None] * D + column[None, :]
    state = tl.load(at, mask=inside[:, None], other=0.0)
    key = _activated(tl.load(k + sequence * k_b + head * k_h + column), SILU)
    query = _activated(tl.load(q + sequence * q_b + head * q_h + column), SILU)
    value = _activated(tl.load(v + sequence * v_b + head * v_h + row), SILU)
    decay = tl.exp2(-tl.load(slopes + head) * 1.4426950408889634)
    state = state * decay + value[:, None] * key[None, :]
    tl.store(at, state, mask=inside[:, None])
    result = tl.where(inside, tl.sum(state * query[None, :], 1), 0.0)
    tl.store(out + (sequence * heads + head) * D + row, result.to(out.dtype.element_ty))


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor | None,
    block: int = BLOCK,
    warps: int = WARPS,
    silu: bool = False,
) -> torch.Tensor:
    """One token for each of B sequences, as `operator.lightning_decode` says; [B, H, D] in the type of v.

    With `silu` q, k and v are taken before SiLU.
    """
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, head_dim = v.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block = min(block, head_dim)
    strides = [size for x in (q, k, v) for size in (x.stride(0), x.stride(1))]
    if batch and heads:
        decode_kernel[(batch * heads * (head_dim // block),)](
            *(q, k, v, slopes, pool, slots, out),
            *(*strides, heads),
            D=head_dim,
            BLOCK=block,
            SLOTS=slots is not None,
            SILU=silu,
            num_warps=warps,
        )
    return out
