"""The Triton kernel that verifies draft tokens, and its launch: one read and one write of the states, whatever their number."""
# mypy: allow-untyped-defs
# No `from __future__ import annotations`: Triton reads the annotations of arguments.

import torch
import triton
import triton.language as tl

from posttrain.kernels.lightning.launch import INTERPRETED

BLOCK, WARPS, WARPS_IN_FP32 = 32, 2, 8
"""Rows of a state that a program holds, and its warps: with bf16 a warp holds 16 rows and all columns, so that sums stay inside
it; products in fp32, for other types, take more registers."""
TOKENS: tl.constexpr = tl.constexpr(16)
"""Tokens of a tile: the least depth of a product of bf16."""


@triton.jit
def _leading(x):
    """The leading 8 bits of fp32 x, cut off and not rounded, as bf16; and the rest of x, which is exact."""
    bits = x.to(tl.uint32, bitcast=True)
    leading = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return leading, x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, PIECES: tl.constexpr):
    """a b of fp32 a and bf16 b by tensor cores, a as a sum of 2 or 3 pieces of 8 bits; in fp32 as they are for 0 pieces."""
    if PIECES == 0:
        result = tl.dot(a, b.to(tl.float32), input_precision="ieee")
    else:
        high, rest = _leading(a)
        middle, rest = _leading(rest)
        if PIECES == 3:
            low, _ = _leading(rest)
            result = tl.dot(middle, b, tl.dot(low, b))
        else:
            result = tl.dot(middle, b)
        result = tl.dot(high, b, result)
    return result


@triton.jit(do_not_specialize=["heads"], do_not_specialize_on_alignment=["accepted", "slots"])
def verify_kernel(
    q, k, v, pending_k, pending_v, accepted, slopes, pool, slots, out,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, pending_k_b, pending_k_t, pending_k_h, pending_v_b, pending_v_t, pending_v_h,
    heads,
    D: tl.constexpr, BLOCK: tl.constexpr, DRAFTS: tl.constexpr, PENDING: tl.constexpr, SLOTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Moves a state on by the accepted pending tokens, stores it, and reads it out after each draft token.

    One program: one sequence, one head, BLOCK rows of its state. Products with bf16 are made by tensor cores; the fp32 factor is
    cut into pieces of bf16 (SPLIT): three, which is all of it, for what goes into a state, and two for what is only read.
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
    token = tl.arange(0, TOKENS)
    inside = (place >= 0) & (row >= 0)
    at = pool + (place * heads + head) * (D * D) + row[:, None] * D + column[None, :]
    state = tl.load(at, mask=inside[:, None], other=0.0)
    rate = tl.load(slopes + head) * 1.4426950408889634
    if PENDING > 0:
        taken = tl.minimum(tl.maximum(tl.load(accepted + sequence).to(tl.int32), 0), PENDING)
        known = token < taken
        pk = pending_k + sequence * pending_k_b + head * pending_k_h
        pv = pending_v + sequence * pending_v_b + head * pending_v_h
        keys = tl.load(pk + (token * pending_k_t)[:, None] + column[None, :], mask=known[:, None], other=0.0)
        values = tl.load(pv + (token * pending_v_t)[None, :] + row[:, None], mask=known[None, :] & (row[:, None] >= 0), other=0.0)
        aged = values.to(tl.float32) * tl.exp2(-rate * tl.maximum(taken - 1 - token, 0).to(tl.float32))[None, :]
        # Not into the state as an accumulator: tensor cores round sums towards zero, which would add up from call to call.
        state = state * tl.exp2(-rate * taken.to(tl.float32)) + _product(aged, keys, 3 if SPLIT else 0)
        tl.store(at, state, mask=(inside & (taken > 0))[:, None])
    if DRAFTS > 0:
        known = token < DRAFTS
        draft = tl.arange(0, 8)
        asked = draft < DRAFTS
        xq = tl.load(q + sequence * q_b + head * q_h + (draft * q_t)[:, None] + column[None, :], mask=asked[:, None], other=0.0)
        xk = tl.load(k + sequence * k_b + head * k_h + (token * k_t)[:, None] + column[None, :], mask=known[:, None], other=0.0)
        xv = tl.load(
            v + sequence * v_b + head * v_h + (token * v_t)[None, :] + row[:, None],
            mask=known[None, :] & (row[:, None] >= 0),
            other=0.0,
        )
        result = _product(state, tl.trans(xq), 2 if SPLIT else 0) * tl.exp2(-rate * (draft + 1).to(tl.float32))[None, :]
        gap = draft[None, :] - token[:, None]
        mask = tl.where(gap >= 0, tl.exp2(-rate * tl.maximum(gap, 0).to(tl.float32)), 0.0)
        if SPLIT:
            scores = tl.dot(xk, tl.trans(xq)) * mask
            high, rest = _leading(scores)
            low, _ = _leading(rest)
            result = tl.dot(xv, high, tl.dot(xv, low, result))
        else:
            scores = _product(xk.to(tl.float32), tl.trans(xq), 0) * mask
            result += _product(xv.to(tl.float32), scores, 0)
        result = tl.where(inside[:, None], result, 0.0)
        target = out + ((sequence * DRAFTS + draft) * heads + head)[None, :] * D + row[:, None]
        tl.store(target, result.to(out.dtype.element_ty), mask=asked[None, :] & (row[:, None] >= 0))


def verify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    pending_k: torch.Tensor | None,
    pending_v: torch.Tensor | None,
    accepted: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> torch.Tensor:
    """R draft tokens for each of B sequences, as `serving.lightning_verify` says; [B, R, H, D] in the type of v."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, drafts, heads, head_dim = v.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not batch or not heads:
        return out
    pending = 0
    pending_strides = [0] * 6
    if pending_k is not None and pending_v is not None:
        pending = pending_k.shape[1]
        pending_k, pending_v = (x if x.stride(3) == 1 else x.contiguous() for x in (pending_k, pending_v))
        pending_strides = [*pending_k.stride()[:3], *pending_v.stride()[:3]]
    if not drafts and not pending:
        return out
    block, split = min(BLOCK, head_dim), v.dtype == torch.bfloat16 and not INTERPRETED
    verify_kernel[(batch * heads * (head_dim // block),)](
        *(q, k, v, pending_k, pending_v, accepted, slopes, pool, slots, out),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *pending_strides, heads),
        D=head_dim,
        BLOCK=block,
        DRAFTS=drafts,
        PENDING=pending,
        SLOTS=slots is not None,
        SPLIT=split,
        num_warps=WARPS if split else WARPS_IN_FP32,
    )
    return out
