"""The Triton kernels of RMSNorm with a sigmoid gate, and their launches: every input is read once, every output written once.

    y = sigmoid(g) * x * r * w,   r = 1 / sqrt(mean(x^2) + eps) of a row

and from a gradient dy, with s = sigmoid(g), n = x r and p = dy s w:

    dg = dy s (1 - s) n w,   dw = sum over rows of dy s n,   dx = r (p - n mean(p n)).

Everything in fp32, rounded once. The forward pass leaves nothing behind: r is made anew from the row, which the backward pass
reads in any case.
"""
# mypy: allow-untyped-defs
# No `from __future__ import annotations`: Triton reads the annotations of arguments.

import functools

import torch
import triton
import triton.language as tl

MAX_WIDTH = 32768
"""Numbers of a row: a program holds a whole row in registers (the backward pass spills some beyond 8,192)."""
FORWARD_SHARE, BACKWARD_SHARE = 1024, 512
"""Numbers of a row that a warp holds."""
WARPS_OF_A_PROCESSOR, LONE_WARPS = 16, 8
"""Warps of the backward pass on a processor; a program of LONE_WARPS or more, which reads long rows ahead, has it to itself.

A program holds dw from row to row, so there are no more of them than run at once.
"""
ROWS_AHEAD, BYTES_AHEAD = 2, 96 * 1024
"""What a program of the backward pass reads ahead: at most so many rows of x, gate and dy, and bytes of shared memory."""


@triton.jit
def gated_norm_kernel(x, gate, weight, out, x_t, gate_t, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row. x, gate [T, WIDTH] with strides _t and 1, weight [WIDTH], out [T, WIDTH] dense."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * x_t + column, mask=inside, other=0.0).to(tl.float32)
    opening = tl.load(gate + row * gate_t + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    size = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    result = tl.sigmoid(opening) * (value * size * scale)
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)


# Not specialised: one compiled kernel serves every number of rows.
@triton.jit(do_not_specialize=["rows"])
def gated_norm_backward_kernel(
    x, gate, weight, dy, dx, dgate, shares, x_t, gate_t, dy_t, rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program n of N: rows n, n + N, ...; its share of dw goes to row n of `shares`, fp32 [N, WIDTH].

    x, gate, dy [T, WIDTH] with strides _t and 1; dx, dgate [T, WIDTH] dense.
    """
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    first = tl.full((), 0, tl.int64)  # a row times a stride can pass 2^31
    for number in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = first + number
        value = tl.load(x + row * x_t + column, mask=inside, other=0.0).to(tl.float32)
        opening = tl.load(gate + row * gate_t + column, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(dy + row * dy_t + column, mask=inside, other=0.0).to(tl.float32)
        open_share = tl.sigmoid(opening)
        above = above * open_share
        pull = above * scale
        size = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
        along = tl.sum(pull * value, 0) / WIDTH * size
        normal = value * size
        share += above * normal
        to = row * WIDTH + column
        tl.store(dgate + to, (pull * normal * (1 - open_share)).to(dgate.dtype.element_ty), mask=inside)
        tl.store(dx + to, ((pull - normal * along) * size).to(dx.dtype.element_ty), mask=inside)
    tl.store(shares + tl.program_id(0).to(tl.int64) * WIDTH + column, share, mask=inside)


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """As it lies where its rows are dense, else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _warps(block: int, share: int) -> int:
    return min(max(block // share, 1), 32)


def _stages(block: int, number_bytes: int) -> int:
    """Pipeline stages for rows of `block` numbers, each with `number_bytes` in x, gate and dy together."""
    return 1 + min(ROWS_AHEAD, BYTES_AHEAD // (block * number_bytes))


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, warps: int | None = None) -> torch.Tensor:
    """sigmoid(gate) * RMSNorm(x), [T, W] dense, in the type that x and gate promote to.

    Args:
        x, gate: [T, W] with W at most MAX_WIDTH, any strides; bf16, fp16 or fp32 each.
        weight: [W], dense.
        eps: added to the mean of squares.
        warps: instead of what is measured best.
    """
    x, gate = _dense_rows(x), _dense_rows(gate)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, gate.dtype), device=x.device)
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    if out.numel():
        gated_norm_kernel[(rows,)](
            *(x, gate, weight, out, x.stride(0), gate.stride(0), eps),
            WIDTH=width,
            BLOCK=block,
            num_warps=warps or _warps(block, FORWARD_SHARE),
        )
    return out


def gated_norm_backward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dy: torch.Tensor,
    warps: int | None = None,
    programs: int | None = None,
    stages: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, gate and weight, each in the type of what it is the gradient of; the same bits at every call.

    Args:
        x, gate, weight, eps: as given to `gated_norm`.
        dy: gradient of its result, [T, W], any strides.
        warps, programs, stages: instead of what is measured best.
    """
    x, gate, dy = _dense_rows(x), _dense_rows(gate), _dense_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    warps = warps or _warps(block, BACKWARD_SHARE)
    at_once = _processors(x.device) * (1 if warps >= LONE_WARPS else WARPS_OF_A_PROCESSOR // warps)
    programs = min(programs or at_once, rows)
    shares = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if dx.numel():
        gated_norm_backward_kernel[(programs,)](
            *(x, gate, weight, dy, dx, dgate, shares, x.stride(0), gate.stride(0), dy.stride(0), rows, eps),
            WIDTH=width,
            BLOCK=block,
            STAGES=stages or _stages(block, x.element_size() + gate.element_size() + dy.element_size()),
            num_warps=warps,
        )
    return dx, dgate, shares.sum(0).to(weight.dtype)
