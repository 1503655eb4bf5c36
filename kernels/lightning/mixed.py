"""The Triton kernel of a serving step, and its launches: short prefills and decodes on top of a pool of states.

`walk` is made for long documents: deep pipelines, one program a processor. A serving step is made of short ones, whose time goes
into reading and writing states: here several programs share a processor, chunks are as short as the inputs, nothing is cut.
"""
# mypy: allow-untyped-defs
# No `from __future__ import annotations`: Triton reads the annotations of arguments.

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from posttrain.kernels.lightning.launch import Documents, _operands, forward

CHUNKS = (16, 32, 64)
"""Rows of a chunk: the first that holds the longest prefill, so that a short one does not pay for a long chunk."""
SHORT = 128
"""Longest prefill, in tokens, that is run here; longer ones are walks."""


@dataclass(frozen=True)
class Setting:
    """How the kernel is compiled: rows of a state that a program holds, its warps, and the rows of the longest chunk."""

    block: int
    warps: int = 4
    chunk: int = CHUNKS[-1]


PREFILLING, PREFILLING_FP32, DECODING = Setting(64), Setting(32, chunk=32), Setting(16)
"""With prefills; with prefills in fp32, which do not use tensor cores; and without, as `decode`."""


@triton.jit
def _chunk(x, stride, first, count, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Rows first .. first + count of x [.., WIDTH], and zeros behind them up to CHUNK."""
    row = tl.arange(0, CHUNK)
    line = (first + row).to(tl.int64) * stride
    return tl.load(x + line[:, None] + tl.arange(0, WIDTH)[None, :], mask=(row < count)[:, None], other=0.0)


@triton.jit
def _advance(
    state, xq, xk, xv, rate, count, target, stride, first,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, SCORE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state [BLOCK, D] after a chunk of `count` tokens, whose outputs it writes; rows past the end are zeros.

    In this order, the state before the scores, a chunk of 64 spills no registers.
    """
    row = tl.arange(0, CHUNK)
    result = tl.dot(state.to(OPERAND), tl.trans(xq).to(OPERAND), input_precision=PRECISION)
    result *= tl.exp2(-rate * (row + 1).to(tl.float32))[None, :]
    age = tl.exp2(-rate * tl.maximum(count - 1 - row, 0).to(tl.float32))
    aged = (xv.to(tl.float32) * age[:, None]).to(OPERAND)
    state = tl.dot(tl.trans(aged), xk.to(OPERAND), state * tl.exp2(-rate * count.to(tl.float32)), input_precision=PRECISION)
    gap = row[None, :] - row[:, None]
    scores = tl.dot(xk.to(SCORE), tl.trans(xq).to(SCORE), input_precision=PRECISION)
    scores *= tl.where(gap >= 0, tl.exp2(-rate * tl.maximum(gap, 0).to(tl.float32)), 0.0)
    result = tl.dot(tl.trans(xv).to(OPERAND), scores.to(OPERAND), result, input_precision=PRECISION)
    at = target + ((first + row).to(tl.int64) * stride)[None, :] + tl.arange(0, BLOCK)[:, None]
    tl.store(at, result.to(target.dtype.element_ty), mask=(row < count)[None, :])
    return state


@triton.jit(do_not_specialize=["heads", "prefills", "decodes"], do_not_specialize_on_alignment=["cu_seqlens", "slots"])
def mixed_kernel(
    q, k, v, slopes, cu_seqlens, pool, slots, out,
    q_t, q_h, k_t, k_h, v_t, v_h,
    heads, prefills, decodes,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PREFILL: tl.constexpr,
    SCORE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one prefill or one decode, one head, BLOCK rows of its state. Prefills are the first programs.

    Args:
        q, k, v: [T, H, D], first the `decodes` tokens of the decodes, then those of the prefills.
        cu_seqlens: where the prefills lie among the T tokens, [prefills + 1].
        slots: place in `pool` of every decode, then of every prefill; -1 for none.
        pool: fp32 [S, H, D, D], values first.
        out: [T, H, D] contiguous.
        PREFILL: there are prefills; a kernel without them needs few registers.
        SCORE, OPERAND, PRECISION: as in `walk_kernel`.
    """
    pid = tl.program_id(0)
    piece = pid % (D // BLOCK)
    rest = pid // (D // BLOCK)
    head = (rest % heads).to(tl.int64)  # times a stride it can pass 2^31
    item = rest // heads
    column = tl.arange(0, D)
    block = piece * BLOCK + tl.arange(0, BLOCK)
    tile = block[:, None] * D + column[None, :]
    q += head * q_h
    k += head * k_h
    v += head * v_h
    out += head * D
    rate = tl.load(slopes + head) * 1.4426950408889634
    if PREFILL and item < prefills:
        start = tl.load(cu_seqlens + item).to(tl.int32)
        tokens = tl.load(cu_seqlens + item + 1).to(tl.int32) - start
        place = tl.load(slots + decodes + item).to(tl.int64)
        kept = (place >= 0) & (tokens > 0) & (block[:, None] >= 0)
        # A chunk is loaded before the state is waited for, and not where it is used: most prefills have no other.
        count = tl.minimum(tokens, CHUNK)
        xq = _chunk(q, q_t, start, count, CHUNK, D)
        xk = _chunk(k, k_t, start, count, CHUNK, D)
        xv = _chunk(v + piece * BLOCK, v_t, start, count, CHUNK, BLOCK)
        at = pool + (place * heads + head) * (D * D) + tile
        state = tl.load(at, mask=kept, other=0.0)
        target = out + piece * BLOCK
        width = heads * D
        for first in range(0, tokens, CHUNK):
            state = _advance(
                state, xq, xk, xv, rate, count, target, width, start + first, BLOCK, CHUNK, SCORE, OPERAND, PRECISION
            )  # fmt: skip
            following = start + first + CHUNK
            count = tl.minimum(tokens - first - CHUNK, CHUNK)
            xq = _chunk(q, q_t, following, count, CHUNK, D)
            xk = _chunk(k, k_t, following, count, CHUNK, D)
            xv = _chunk(v + piece * BLOCK, v_t, following, count, CHUNK, BLOCK)
        tl.store(at, state, mask=kept)
    else:
        sequence = item
        if PREFILL:
            sequence = item - prefills
        place = tl.load(slots + sequence).to(tl.int64)
        inside = (place >= 0) & (block >= 0)
        at = pool + (place * heads + head) * (D * D) + tile
        state = tl.load(at, mask=inside[:, None], other=0.0)
        token = sequence.to(tl.int64)
        key = tl.load(k + token * k_t + column).to(tl.float32)
        query = tl.load(q + token * q_t + column).to(tl.float32)
        value = tl.load(v + token * v_t + block).to(tl.float32)
        state = state * tl.exp2(-rate) + value[:, None] * key[None, :]
        tl.store(at, state, mask=inside[:, None])
        result = tl.where(inside, tl.sum(state * query[None, :], 1), 0.0)
        tl.store(out + token * heads * D + block, result.to(out.dtype.element_ty))


def chunk_for(max_length: int, longest: int = CHUNKS[-1]) -> int:
    """Rows of a chunk for prefills of at most `max_length` tokens, out of CHUNKS and at most `longest`."""
    return next((size for size in CHUNKS if size >= min(max_length, longest)), CHUNKS[-1])


@dataclass(frozen=True)
class _Step:
    """The arguments of `mixed`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slopes: torch.Tensor
    pool: torch.Tensor
    slots: torch.Tensor
    cu_seqlens: torch.Tensor | None
    decodes: int
    max_length: int

    def walk(self) -> torch.Tensor:
        """Outputs of the prefills among rows for all tokens; the others are left as they are."""
        assert self.cu_seqlens is not None
        documents = Documents(self.cu_seqlens.shape[0] - 1, 0, self.cu_seqlens)
        slots = self.slots[self.decodes :]
        return forward(self.q, self.k, self.v, self.slopes, documents, initial=self.pool, final=self.pool, slots=slots)

    def launch(self, out: torch.Tensor | None, prefills: int, decodes: int) -> torch.Tensor:
        """Writes the outputs of all prefills or none, and of all decodes or none, into `out`, or into a new tensor."""
        q, k, v = self.q, self.k, self.v
        _, heads, head_dim = v.shape
        if out is None:
            out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        setting = DECODING if not prefills else PREFILLING_FP32 if v.dtype == torch.float32 else PREFILLING
        block = min(setting.block, head_dim)
        programs = (prefills + decodes) * heads * (head_dim // block)
        if not programs:
            return out
        score, operand, precision = _operands(v.dtype)
        mixed_kernel[(programs,)](
            *(q, k, v, self.slopes, self.cu_seqlens if prefills else None, self.pool, self.slots, out),
            *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
            *(heads, prefills, self.decodes),
            D=head_dim,
            BLOCK=block,
            CHUNK=chunk_for(self.max_length, setting.chunk) if prefills else CHUNKS[0],
            PREFILL=prefills > 0,
            SCORE=score,
            OPERAND=operand,
            PRECISION=precision,
            num_warps=setting.warps,
        )
        return out


def mixed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    decodes: int,
    max_length: int,
) -> torch.Tensor:
    """One serving step, as `serving.lightning_mixed` says; [T, H, D] in the type of v.

    Prefills of at most SHORT tokens and all decodes are one launch, prefills first, so that their longer programs begin first:
    what is launched one by one is paid for by the host, and there one launch is cheapest. In a CUDA graph, where launches cost
    little, they are two branches side by side. Longer prefills are walks, which leave nothing to hide decodes behind.
    """
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    prefills = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    step = _Step(q, k, v, slopes, pool, slots, cu_seqlens, decodes, max_length)
    if not prefills or not decodes:
        return step.walk() if prefills and max_length > SHORT else step.launch(None, prefills, decodes)
    if max_length > SHORT:
        return step.launch(step.walk(), 0, decodes)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return _in_branches(step, prefills)
    kind = (q.device, q.dtype, q.shape[2], slots.dtype)
    if q.is_cuda and kind not in _seen:
        # Once apart: what a capture launches has to be compiled before, and callers warm up by a step like the captured one.
        _seen.add(kind)
        return step.launch(step.launch(None, prefills, 0), 0, decodes)
    return step.launch(None, prefills, decodes)


_seen: set[tuple[torch.device, torch.dtype, int, torch.dtype]] = set()


def _in_branches(step: _Step, prefills: int) -> torch.Tensor:
    """A step while a graph is captured: the decodes begin where the prefills begin, and both end before what comes next."""
    current, branch = torch.cuda.current_stream(), _branch(step.q.device)
    out = torch.empty(step.v.shape, dtype=step.v.dtype, device=step.v.device)
    branch.wait_stream(current)
    step.launch(out, prefills, 0)
    with torch.cuda.stream(branch):
        step.launch(out, 0, step.decodes)
    current.wait_stream(branch)
    return out


@functools.cache
def _branch(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a graph's second branch is captured."""
    return torch.cuda.Stream(device)
