"""Lightning attention as an inference server needs it: draft tokens verified, and decodes and prefills in one call.

States lie in a pool that moves on in place, as in `operator.lightning_decode`. Nothing is read from the device with backend
`triton`, so both functions can be captured in a CUDA graph. Backends as in `operator`; `matmul` and `torch` wait for the device.
"""

from __future__ import annotations

import torch

from posttrain.kernels.lightning import serving_registration
from posttrain.kernels.lightning.operator import choose_backend, lightning_attention, lightning_decode

MAX_DRAFTS = 8
"""Draft tokens of one verification: a program steps through them one by one, so many would cost more than reading the state."""


def lightning_verify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    pending_k: torch.Tensor | None = None,
    pending_v: torch.Tensor | None = None,
    accepted: torch.Tensor | None = None,
    *,
    state_slots: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Outputs of R draft tokens of each of B sequences, as if the drafts were decoded one by one, before it is known which stay.

    What is kept of the drafts is decided after this call, so the next call commits it: the caller hands back k and v of this
    call as `pending_k` and `pending_v`, and how many of them were accepted. Stored are states after the accepted tokens and
    before the drafts. Each state is read once and written once, whatever R; with nothing pending it is not written. A call with
    R = 0 commits alone.

    With backend `triton` states are those of decoding token by token up to roundings of fp32, and outputs of bf16 are computed
    from states of 16 significant bits (the rest are cut off) before they are rounded to 8.

    Args:
        q, k, v: [B, R, H, D] of one floating type, 0 <= R <= MAX_DRAFTS, D dense.
        slopes: decay rates s >= 0, [H], fp32 or fp64.
        pool: states before the pending tokens, [S, H, V, K], fp32 (fp64 with fp64 inputs), contiguous; updated in place.
        pending_k, pending_v: keys and values of the last call, [B, R', H, D], 0 <= R' <= MAX_DRAFTS; None in the first call.
        accepted: how many of the pending tokens, from the first, were accepted, int32 or int64 [B]; a count below 0 is 0, one
            above R' is R'. Rejected tokens are not looked at. None in the first call.
        state_slots: slot of each sequence, int32 or int64 [B], no slot twice; -1 is a padded row, whose output is zero. None
            for sequence n in slot n.
        backend: one of `operator.BACKENDS`; `matmul` and `torch` are the same here.

    Returns:
        [B, R, H, V] in the type of `v`.

    Raises:
        ValueError: shapes, types or devices do not fit together.
        UserError: the backend asked for is unknown or cannot run these tensors.

    Source: the recurrence of MiniMax-01 paper section 2.2.1; the commit put off to the next call, as for gated delta nets in
    speculative decoding.
    """
    pending = (pending_k, pending_v, accepted)
    _check_drafts(q, k, v, pending)
    _check_common(q, k, v, slopes, pool, state_slots, v.shape[0], [x for x in pending if x is not None])
    if choose_backend(backend, v) == "triton":
        return serving_registration.lightning_verify(q, k, v, slopes.float().contiguous(), pool, *pending, state_slots)
    rates = slopes.to(pool.dtype)
    if state_slots is None:
        states, present = pool, None
    else:
        present = state_slots >= 0
        states = pool[state_slots.clamp(min=0).long()]
    if pending_k is not None and pending_v is not None and accepted is not None:
        states = _committed(states, pending_k, pending_v, accepted, rates)
        if state_slots is None or present is None:
            pool.copy_(states)
        else:
            pool[state_slots[present].long()] = states[present]
    out = _read_out(states, q, k, v, rates).to(v.dtype)
    return out if present is None else torch.where(present[:, None, None, None], out, 0.0)


def lightning_mixed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    *,
    num_decodes: int,
    state_slots: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    max_length: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """One step of a server: one token for each of `num_decodes` sequences, and prefills of any lengths on top of their states.

    Prefills of up to `mixed.SHORT` tokens and the decodes are one launch, the prefills first, so that the decodes run beside
    them; the time of a short prefill goes by its length. In a CUDA graph they are two branches that run side by side. Longer
    prefills are walks, and the decodes a launch behind them.

    Args:
        q, k, v: [T, H, D] of one floating type, D dense: first the tokens of the decodes, then those of the prefills.
        slopes: decay rates s >= 0, [H], fp32 or fp64.
        pool: states [S, H, V, K], fp32 (fp64 with fp64 inputs), contiguous; updated in place.
        num_decodes: sequences that decode.
        state_slots: slots of the decodes, then of the prefills, int32 or int64 [num_decodes + N], no slot twice. -1 is a padded
            row of a decode, whose output is zero, or a prefill that begins with zeros and is not kept.
        cu_seqlens: where the N prefills lie among the T tokens, int32 or int64 [N + 1], from num_decodes to T; empty ones are
            allowed. None for no prefills.
        max_length: tokens of the longest prefill, on the host, where known (default: all of them together). It picks how the
            prefills are run; a number that is too small costs time, not correctness.
        backend: one of `operator.BACKENDS`.

    Returns:
        [T, H, V] in the type of `v`.

    Raises:
        ValueError: shapes, types or devices do not fit together.
        UserError: the backend asked for is unknown or cannot run these tensors.

    Source: MiniMax-01 paper section 3.3 (multi-level padding by the length of the input, decodes beside prefills).
    """
    prefills = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    _check_step(q, k, v, num_decodes, cu_seqlens, max_length)
    _check_common(q, k, v, slopes, pool, state_slots, num_decodes + prefills, [] if cu_seqlens is None else [cu_seqlens])
    chosen = choose_backend(backend, v)
    rest = len(v) - num_decodes
    if chosen == "triton":
        longest = rest if max_length is None else min(max_length, rest)
        rates = slopes.float().contiguous()
        return serving_registration.lightning_mixed(q, k, v, rates, pool, state_slots, cu_seqlens, num_decodes, longest)
    first, last = slice(num_decodes), slice(num_decodes, None)
    out = lightning_decode(q[first], k[first], v[first], slopes, pool, state_slots=state_slots[first], backend=chosen)
    if cu_seqlens is None:
        return out
    offsets, slots = cu_seqlens - num_decodes, state_slots[last]
    more, _ = lightning_attention(
        *(q[last], k[last], v[last], slopes), cu_seqlens=offsets, initial_state=pool, state_slots=slots, backend=chosen
    )
    return torch.cat([out, more])


def _committed(
    states: torch.Tensor, pending_k: torch.Tensor, pending_v: torch.Tensor, accepted: torch.Tensor, rates: torch.Tensor
) -> torch.Tensor:
    """States [B, H, V, K] after the accepted tokens."""
    token = torch.arange(pending_k.shape[1], device=states.device)
    count = accepted.clamp(0, len(token))
    kept = token < count[:, None]
    age = (count[:, None] - 1 - token).clamp(min=0)
    keys, values = (torch.where(kept[..., None, None], x, 0.0).to(states.dtype) for x in (pending_k, pending_v))
    values = values * torch.exp(-rates * age[..., None])[..., None]
    return states * torch.exp(-rates * count[:, None])[..., None, None] + torch.einsum("bthv,bthk->bhvk", values, keys)


def _read_out(states: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Outputs [B, R, H, V] of drafts on top of states [B, H, V, K]."""
    q, k, v = (x.to(states.dtype) for x in (q, k, v))
    token = torch.arange(v.shape[1], device=v.device)
    gap = token[:, None] - token
    mask = torch.where(gap >= 0, torch.exp(-rates[:, None, None] * gap.clamp(min=0)), 0.0)
    scores = torch.einsum("bthk,bjhk->bhtj", q, k) * mask
    before = torch.einsum("bhvk,bthk->bthv", states, q) * torch.exp(-rates * (token[:, None] + 1))[..., None]
    return before + torch.einsum("bhtj,bjhv->bthv", scores, v)


def _check_drafts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pending: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> None:
    """ValueError, in one line, for drafts or pending tokens that do not fit."""
    if v.dim() != 4 or not q.shape == k.shape == v.shape or v.shape[1] > MAX_DRAFTS:
        raise ValueError(f"q, k, v must be [B, R <= {MAX_DRAFTS}, H, D] alike, got {[tuple(x.shape) for x in (q, k, v)]}")
    pending_k, pending_v, accepted = pending
    if pending_k is None and pending_v is None and accepted is None:
        return
    if pending_k is None or pending_v is None or accepted is None:
        raise ValueError("pending_k, pending_v and accepted go together: all of the last verification, or none in the first")
    batch, _, heads, head_dim = v.shape
    fits = pending_k.dim() == 4 and pending_k.shape[1] <= MAX_DRAFTS and pending_k.shape == pending_v.shape
    if not fits or pending_k.shape[0] != batch or pending_k.shape[2:] != (heads, head_dim):
        raise ValueError(
            f"pending_k, pending_v must be [{batch}, R <= {MAX_DRAFTS}, {heads}, {head_dim}] alike, "
            f"got {tuple(pending_k.shape)}, {tuple(pending_v.shape)}"
        )
    if not pending_k.dtype == pending_v.dtype == v.dtype:
        raise ValueError(f"pending_k, pending_v must be {v.dtype} as v, got {pending_k.dtype}, {pending_v.dtype}")
    if accepted.shape != (batch,) or accepted.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"accepted must be int32 or int64 [{batch}], got {accepted.dtype} {tuple(accepted.shape)}")


def _check_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_decodes: int, cu_seqlens: torch.Tensor | None, max_length: int | None
) -> None:
    """ValueError, in one line, for tokens that are not those of decodes and prefills."""
    if v.dim() != 3 or not q.shape == k.shape == v.shape:
        raise ValueError(f"q, k, v must be [T, H, D] alike, got {[tuple(x.shape) for x in (q, k, v)]}")
    if not 0 <= num_decodes <= len(v) or (cu_seqlens is None and num_decodes != len(v)):
        raise ValueError(f"{len(v)} tokens are not those of {num_decodes} decodes{'' if cu_seqlens is None else ' and prefills'}")
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"cu_seqlens must be int32 or int64 [N + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if max_length is not None and max_length < 0:
        raise ValueError(f"max_length must be at least 0, got {max_length}")


def _check_common(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor | None,
    sequences: int,
    others: list[torch.Tensor],
) -> None:
    """ValueError, in one line, for types, slopes, a pool or slots that do not fit."""
    if not q.dtype == k.dtype == v.dtype or not v.is_floating_point():
        raise ValueError(f"q, k, v must be of one floating type, got {q.dtype}, {k.dtype}, {v.dtype}")
    given = [q, k, slopes, pool, *others, *([] if slots is None else [slots])]
    if any(x.device != v.device for x in given):
        raise ValueError(f"all tensors must be on {v.device}, got {sorted({str(x.device) for x in given})}")
    heads, head_dim = v.shape[-2:]
    if slopes.shape != (heads,):
        raise ValueError(f"slopes must be [{heads}], got {tuple(slopes.shape)}")
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    fits = pool.dim() == 4 and pool.shape[1:] == (heads, head_dim, head_dim) and pool.dtype == compute and pool.is_contiguous()
    if not fits or (slots is None and len(pool) != sequences):
        count = "S" if slots is not None else str(sequences)
        raise ValueError(
            f"the pool must be {compute} [{count}, {heads}, {head_dim}, {head_dim}], contiguous, "
            f"got {pool.dtype} {tuple(pool.shape)}"
        )
    if slots is not None and (slots.shape != (sequences,) or slots.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"state_slots must be int32 or int64 [{sequences}], got {slots.dtype} {tuple(slots.shape)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, slopes, pool, *others)):
        raise ValueError("states are updated in place, without gradients: use it under torch.no_grad()")
