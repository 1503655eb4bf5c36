"""Lightning attention as callers use it: one function for prefill and training, one for decoding, three backends.

- `triton`: the kernels of `walk` and `decode`, on NVIDIA GPUs; bf16, fp16 and fp32, heads of 16, 32, 64 or 128.
- `matmul`: batched products of torch over blocks, on any device, fp64 too.
- `torch`: the chunked path, cheapest where launches cost nothing. Reads the lengths, so on a GPU it waits for it.

`auto` takes `triton` on a GPU where it can run, else `matmul` there, and `torch` on a CPU, and logs once what it took.
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

from posttrain.config.errors import UserError
from posttrain.kernels.lightning import registration
from posttrain.kernels.lightning.chunked import lightning_attention as chunked_attention
from posttrain.kernels.lightning.chunked import lightning_decode_step
from posttrain.kernels.lightning.matmul import lightning_matmul
from posttrain.kernels.lightning.silu import Activation, activated, is_silu

BACKENDS = ("auto", "triton", "matmul", "torch")
log = logging.getLogger(__name__)


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    state_slots: torch.Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal linear attention with a constant decay per head; differentiable in q, k, v and the initial state.

    o_t = sum_{j <= t} exp(-s (t - j)) (q_t . k_j) v_j inside a document, plus exp(-s (t + 1)) S_0 q_t from its initial
    state. No scale, no softmax. With backends `triton` and `matmul` nothing is read from the device.

    Args:
        q, k, v: [T, H, D] packed or [B, T, H, D] of one length, one floating type, any strides of tokens and heads (views of
            an interleaved projection are read as they lie).
        slopes: decay rates s >= 0, [H], fp32 or fp64; constants, without gradient.
        cu_seqlens: offsets of packed documents, int32 or int64 [N + 1] on the device of q, from 0 to T; empty documents are
            allowed. None for one document, or for B of them.
        initial_state: [N, H, V, K], fp32 (fp64 with fp64 inputs), or None for zeros. With `state_slots` a pool
            [S, H, V, K], updated in place.
        state_slots: slot of each document in the pool, int32 or int64 [N], no slot twice; -1 begins with zeros and is not
            kept. Inference only.
        output_final_state: also return the states after the last token of each document.
        backend: one of BACKENDS.

    Returns:
        Outputs in the shape and type of `v`, and final states [N, H, V, K] or None.

    Raises:
        ValueError: shapes, types or devices do not fit together.
        UserError: the backend asked for is unknown or cannot run these tensors.

    Source: MiniMax-01 paper section 2.2.1, with the decay of the released modelling code.
    """
    _check(q, k, v, slopes, cu_seqlens, initial_state, state_slots, output_final_state)
    chosen = choose_backend(backend, v)
    count = v.shape[0] if v.dim() == 4 else 1
    num = count if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = v.shape
    if v.dim() == 4:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    final: torch.Tensor | None = None
    if chosen == "triton":
        rates = slopes.float().contiguous()
        if state_slots is not None:
            assert initial_state is not None
            out = registration.lightning_prefill(q, k, v, rates, count, cu_seqlens, initial_state, state_slots)
        else:
            start = initial_state.contiguous() if initial_state is not None else None
            out, final = registration.lightning(q, k, v, rates, count, cu_seqlens, start, output_final_state)
        return out.view(shape), final if output_final_state else None
    start = initial_state
    if state_slots is not None:
        assert initial_state is not None
        present = state_slots >= 0
        start = torch.where(present[:, None, None, None], initial_state[state_slots.clamp(min=0).long()], 0.0)
    length = v.shape[0] // max(num, 1)
    if chosen == "matmul":
        offsets = torch.arange(num + 1, device=v.device) * length if cu_seqlens is None else cu_seqlens
        out, final = lightning_matmul(q, k, v, slopes, cu_seqlens=offsets, typical_length=length, initial_state=start)
    else:
        lengths = [length] * num if cu_seqlens is None else cu_seqlens.diff().tolist()
        out, final = chunked_attention(q, k, v, slopes, lengths=lengths, initial_state=start, output_final_state=True)
    if state_slots is not None:
        assert initial_state is not None and final is not None
        initial_state[state_slots[present].long()] = final[present]
    return out.view(shape), final if output_final_state else None


def lightning_attention_qkv(
    qkv: torch.Tensor,
    slopes: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    activation: Activation = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`lightning_attention` of the projection's output as it lies, for training: documents begin with zero states.

    Args:
        qkv: [T, H, 3 D] or [B, T, H, 3 D], every head's q, k and v side by side. The gradient comes back in this layout,
            written once.
        activation: "silu" where q, k and v are SiLU of `qkv`. With `triton` only `qkv` itself is kept for the backward pass.
        slopes, cu_seqlens, backend: as in `lightning_attention`.

    Returns:
        Outputs [T, H, D] or [B, T, H, D].

    Raises:
        ValueError, UserError: as `lightning_attention`; ValueError for another activation.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    if choose_backend(backend, v) != "triton":
        q, k, v = activated(qkv, activation).chunk(3, dim=-1)
        return lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens, backend=backend)[0]
    _check(q, k, v, slopes, cu_seqlens, None, None, False)
    silu = is_silu(activation)
    count = qkv.shape[0] if qkv.dim() == 4 else 1
    flat = qkv.flatten(0, 1) if qkv.dim() == 4 else qkv
    return registration.lightning_qkv(flat, slopes.float().contiguous(), count, cu_seqlens, silu).view(v.shape)


def lightning_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    *,
    state_slots: torch.Tensor | None = None,
    activation: Activation = None,
    backend: str = "auto",
) -> torch.Tensor:
    """One token for each of B sequences: S <- exp(-s) S + v k^T in place, and return S q. Can be captured in a CUDA graph.

    Args:
        q, k, v: [B, H, D] of one floating type, D dense.
        slopes: [H].
        pool: states [S, H, V, K], fp32 (fp64 with fp64 inputs), contiguous; updated in place.
        state_slots: slot of each sequence, int32 or int64 [B], no slot twice; -1 is a padded row, whose output is zero. None
            for sequence n in slot n.
        activation: "silu" where q, k and v are SiLU of what is given.
        backend: one of BACKENDS; `matmul` and `torch` are the same here.

    Returns:
        [B, H, V] in the type of `v`.

    Raises:
        ValueError, UserError: as `lightning_attention`; ValueError for another activation.
    """
    _check(q, k, v, slopes, None, pool, state_slots, False, decoding=True)
    if choose_backend(backend, v) == "triton":
        return registration.lightning_decode(q, k, v, slopes.float().contiguous(), pool, state_slots, is_silu(activation))
    q, k, v = (activated(x, activation) for x in (q, k, v))
    if state_slots is None:
        return lightning_decode_step(q, k, v, slopes, pool)
    present = state_slots >= 0
    states = pool[state_slots.clamp(min=0).long()]
    out = lightning_decode_step(q, k, v, slopes, states)
    pool[state_slots[present].long()] = states[present]
    return torch.where(present[:, None, None], out, 0.0)


def choose_backend(backend: str, v: torch.Tensor) -> str:
    """The backend that `backend` means for tensors like `v`.

    Raises:
        UserError: there is no such backend, or it cannot run them.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown lightning attention backend {backend!r}", instead=f"write one of {', '.join(BACKENDS)}")
    if backend in ("matmul", "torch"):
        return backend
    return _triton_or(backend, v.device.type, v.dtype, v.shape[-1])


# torch.compile takes the answer and does not trace the search for it.
@torch.compiler.assume_constant_result
def _triton_or(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """`triton` where it can run; else, for `auto`, what can, and for `triton` a UserError."""
    obstacle = _triton_obstacle(device, dtype, head_dim)
    if backend == "triton":
        if obstacle is not None:
            raise UserError(
                f"lightning attention backend 'triton' cannot run: {obstacle}", instead="write 'auto', 'matmul' or 'torch'"
            )
        return backend
    chosen = "triton" if obstacle is None else "matmul" if device == "cuda" else "torch"
    _log_choice(chosen, device, str(dtype), head_dim, obstacle)
    return chosen


@functools.cache
def _triton_obstacle(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot run such tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from posttrain.kernels.lightning.launch import DTYPES, HEAD_DIMS, INTERPRETED

    if device != "cuda" and not INTERPRETED:
        return f"the tensors are on {device}, not on a GPU"
    if dtype not in DTYPES:
        return f"it computes {', '.join(map(str, DTYPES))}, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"it has heads of {', '.join(map(str, HEAD_DIMS))} numbers, not {head_dim}"
    return None


@functools.cache
def _log_choice(chosen: str, device: str, dtype: str, head_dim: int, obstacle: str | None) -> None:
    reason = f" ({obstacle})" if obstacle else ""
    log.info("lightning attention on %s, %s, heads of %d: backend %s%s", device, dtype, head_dim, chosen, reason)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    states: torch.Tensor | None,
    slots: torch.Tensor | None,
    output_final_state: bool,
    decoding: bool = False,
) -> None:
    """ValueError, in one line, for what the kernels would read wrongly."""
    if v.dim() not in ((3,) if decoding else (3, 4)) or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k, v must be [T, H, D] or [B, T, H, D] alike, got {[tuple(x.shape) for x in (q, k, v)]}")
    if not q.dtype == k.dtype == v.dtype or not v.is_floating_point():
        raise ValueError(f"q, k, v must be of one floating type, got {q.dtype}, {k.dtype}, {v.dtype}")
    if slopes.shape != (v.shape[-2],) or slopes.requires_grad:
        raise ValueError(f"slopes must be [{v.shape[-2]}] without gradient, got {tuple(slopes.shape)}")
    if cu_seqlens is not None and (v.dim() == 4 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1):
        raise ValueError("cu_seqlens [N + 1] goes with packed tokens [T, H, D]")
    given = [x for x in (q, k, slopes, cu_seqlens, states, slots) if x is not None]
    if any(x.device != v.device for x in given):
        raise ValueError(f"all tensors must be on {v.device}, got {sorted({str(x.device) for x in given})}")
    if any(x.dtype not in (torch.int32, torch.int64) for x in (cu_seqlens, slots) if x is not None):
        raise ValueError("cu_seqlens and state_slots must be int32 or int64")
    num = len(cu_seqlens) - 1 if cu_seqlens is not None else v.shape[0] if decoding or v.dim() == 4 else 1
    if slots is not None and (states is None or output_final_state or slots.shape != (num,)):
        raise ValueError(
            f"state_slots [{num}] needs a pool as initial_state, which it updates in place, and returns no final state"
        )
    if states is None:
        return
    heads, head_dim = v.shape[-2:]
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    fits = states.shape[1:] == (heads, head_dim, head_dim) and states.dtype == compute
    if not fits or (slots is None and len(states) != num):
        raise ValueError(
            f"states must be {compute} [{num}, {heads}, {head_dim}, {head_dim}], got {states.dtype} {tuple(states.shape)}"
        )
    if (decoding or slots is not None) and not states.is_contiguous():
        raise ValueError("states that are updated in place must be contiguous")
    if slots is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, states)):
        raise ValueError("state_slots updates states in place, without gradients: use it under torch.no_grad()")
