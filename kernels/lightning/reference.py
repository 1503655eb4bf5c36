"""The recurrence itself, token by token: slow, obvious, and what every other path is compared with."""

from __future__ import annotations

import torch


def recurrent_lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(-s) S_{t-1} + v_t k_t^T;  o_t = S_t q_t, from S = 0 (or `initial_state`) in every document.

    Args:
        q, k, v: [T, H, D], any float type; computed in fp32, in fp64 where the input is.
        slopes: decay rates s >= 0, [H].
        cu_seqlens: document offsets [N + 1].
        initial_state: [N, H, V, K] or None for zeros.

    Returns:
        Outputs [T, H, V] in the type of `v`, and final states [N, H, V, K] in the compute type.

    Source: MiniMax-01 paper section 2.2.1, with the decay of the released modelling code.
    """
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    qc, kc, vc = q.to(compute), k.to(compute), v.to(compute)
    decay = torch.exp(-slopes.to(compute))[:, None, None]
    offsets = cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        state = vc.new_zeros(v.shape[1], v.shape[2], k.shape[2]) if initial_state is None else initial_state[n].to(compute)
        for t in range(start, stop):
            state = decay * state + vc[t, :, :, None] * kc[t, :, None, :]
            outputs.append((state @ qc[t, :, :, None]).squeeze(-1))
        finals.append(state)
    out = torch.stack(outputs) if outputs else vc.new_zeros(0, v.shape[1], v.shape[2])
    return out.to(v.dtype), torch.stack(finals)
