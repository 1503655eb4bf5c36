"""The kernels of `verify` and `mixed` as `torch.library` operators, with fake implementations; no gradients.

They are defined on a Library and not by `custom_op`, whose wrappers around an operator that mutates a tensor take the host longer
than a small step takes the device.
"""

from __future__ import annotations

import torch

MaybeTensor = torch.Tensor | None
_library = torch.library.Library("posttrain", "FRAGMENT")
_library.define(
    "lightning_verify(Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor(a!) pool, Tensor? pending_k, Tensor? pending_v,"
    " Tensor? accepted, Tensor? slots) -> Tensor"
)
_library.define(
    "lightning_mixed(Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor(a!) pool, Tensor slots, Tensor? cu_seqlens, int decodes,"
    " int max_length) -> Tensor"
)


def _verify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    pending_k: MaybeTensor,
    pending_v: MaybeTensor,
    accepted: MaybeTensor,
    slots: MaybeTensor,
) -> torch.Tensor:
    """Outputs [B, R, H, D] of the drafts; states move on by the accepted pending tokens in place."""
    from posttrain.kernels.lightning.verify import verify

    with torch.cuda.device_of(v):
        return verify(q, k, v, slopes, pool, pending_k, pending_v, accepted, slots)


def _mixed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: MaybeTensor,
    decodes: int,
    max_length: int,
) -> torch.Tensor:
    """Outputs [T, H, D] of decodes and prefills; states move on in place."""
    from posttrain.kernels.lightning.mixed import mixed

    with torch.cuda.device_of(v):
        return mixed(q, k, v, slopes, pool, slots, cu_seqlens, decodes, max_length)


def _dense_like_v(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


for _name, _run in (("lightning_verify", _verify), ("lightning_mixed", _mixed)):
    _library.impl(_name, _run, "CUDA")
    _library.impl(_name, _run, "CPU")  # through Triton's interpreter
    torch.library.register_fake(f"posttrain::{_name}", _dense_like_v, lib=_library)

lightning_verify = torch.ops.posttrain.lightning_verify.default
lightning_mixed = torch.ops.posttrain.lightning_mixed.default
