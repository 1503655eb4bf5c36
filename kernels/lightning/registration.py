"""The Triton kernels as `torch.library` operators, with fake and autograd implementations.

`posttrain::lightning` and `posttrain::lightning_qkv` differ in their inputs only: the second takes the projection's output
[T, H, 3 D] whole, so that its gradient is written where the projection's backward reads it, with no concatenation of three.
Documents are given by `cu_seqlens`, or as `count` of equal length.
"""
# No `from __future__ import annotations`: operators' schemas are read from the annotations.

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from posttrain.kernels.lightning.silu import silu_backward

if TYPE_CHECKING:
    from posttrain.kernels.lightning.launch import Documents

MaybeTensor = torch.Tensor | None


def registered(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the operator posttrain::NAME.

    Args:
        fake: takes the function's arguments and returns empty tensors like its results.
        mutates: names of the arguments that it writes to.
    """

    def register(function: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(f"posttrain::{function.__name__}", function, mutates_args=mutates)
        operator.register_fake(fake)
        return operator

    return register


def dense_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Empty, dense, in the shape of x and in its type where none is given."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _documents(tokens: int, count: int, cu_seqlens: MaybeTensor) -> "Documents":
    from posttrain.kernels.lightning.launch import Documents

    if cu_seqlens is not None:
        return Documents(cu_seqlens.shape[0] - 1, 0, cu_seqlens)
    return Documents(count, tokens // count if count else 0)


def _empty_states(v: torch.Tensor, count: int, cu_seqlens: MaybeTensor, wanted: bool) -> torch.Tensor:
    """fp32 [N, H, D, D], or [0] where not wanted: an operator of torch.library returns tensors, never None."""
    if not wanted:
        return v.new_empty(0, dtype=torch.float32)
    documents = count if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(documents, v.shape[1], v.shape[2], v.shape[2], dtype=torch.float32)


@registered(
    fake=lambda q, k, v, slopes, count, cu_seqlens, initial, want_final: (
        dense_like(v),
        _empty_states(v, count, cu_seqlens, want_final),
    )
)
def lightning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    count: int,
    cu_seqlens: MaybeTensor,
    initial: MaybeTensor,
    want_final: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [T, H, D] and final states."""
    from posttrain.kernels.lightning import launch

    final = _empty_states(v, count, cu_seqlens, want_final)
    documents = _documents(v.shape[0], count, cu_seqlens)
    with torch.cuda.device_of(v):
        out = launch.forward(q, k, v, slopes, documents, initial=initial, final=final if want_final else None)
    return out, final


@registered(
    fake=lambda q, k, v, slopes, count, cu_seqlens, initial, *_: (
        *map(dense_like, (q, k, v)),
        _empty_states(v, count, cu_seqlens, initial is not None),
    )
)
def lightning_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    count: int,
    cu_seqlens: MaybeTensor,
    initial: MaybeTensor,
    do: torch.Tensor,
    final_grad: MaybeTensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv [T, H, D], and the gradient of the initial state where there is one."""
    from posttrain.kernels.lightning import launch

    grads = dense_like(q), dense_like(k), dense_like(v)
    initial_grad = _empty_states(v, count, cu_seqlens, initial is not None)
    with torch.cuda.device_of(v):
        launch.backward(
            *(q, k, v, slopes, _documents(v.shape[0], count, cu_seqlens), do, grads),
            initial=initial,
            final_grad=final_grad,
            initial_grad=initial_grad if initial is not None else None,
        )
    return *grads, initial_grad


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, slopes, ctx.count, cu_seqlens, initial, ctx.want_final = inputs
    ctx.save_for_backward(q, k, v, slopes, cu_seqlens, initial)


def _differentiate(ctx: Any, do: torch.Tensor, final_grad: torch.Tensor) -> tuple[MaybeTensor, ...]:
    q, k, v, slopes, cu_seqlens, initial = ctx.saved_tensors
    end = final_grad.contiguous() if ctx.want_final else None
    dq, dk, dv, start = lightning_backward(q, k, v, slopes, ctx.count, cu_seqlens, initial, do, end)
    return dq, dk, dv, None, None, None, start if initial is not None else None, None


lightning.register_autograd(_differentiate, setup_context=_keep)


@registered(fake=lambda qkv, *_: qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3))
def lightning_qkv(qkv: torch.Tensor, slopes: torch.Tensor, count: int, cu_seqlens: MaybeTensor, silu: bool) -> torch.Tensor:
    """Outputs [T, H, D] of qkv [T, H, 3 D], every head's q, k and v side by side; documents begin with zero states.

    With `silu`, qkv is what comes before SiLU.
    """
    from posttrain.kernels.lightning import launch

    documents = _documents(qkv.shape[0], count, cu_seqlens)
    with torch.cuda.device_of(qkv):
        on_load = silu and launch.silu_on_load(qkv.chunk(3, dim=-1)[2], documents)
        q, k, v = (F.silu(qkv) if silu and not on_load else qkv).chunk(3, dim=-1)
        return launch.forward(q, k, v, slopes, documents, silu=on_load)


@registered(fake=lambda qkv, *_: dense_like(qkv))
def lightning_qkv_backward(
    qkv: torch.Tensor, slopes: torch.Tensor, count: int, cu_seqlens: MaybeTensor, silu: bool, do: torch.Tensor
) -> torch.Tensor:
    """Gradient of qkv, [T, H, 3 D], written by the walks into one tensor; `silu` is made anew, and its gradient in place."""
    from posttrain.kernels.lightning import launch

    grad = dense_like(qkv)
    dq, dk, dv = grad.chunk(3, dim=-1)
    with torch.cuda.device_of(qkv):
        q, k, v = (F.silu(qkv) if silu else qkv).chunk(3, dim=-1)
        launch.backward(q, k, v, slopes, _documents(qkv.shape[0], count, cu_seqlens), do, (dq, dk, dv))
        if silu:
            silu_backward(qkv, grad)
    return grad


def _keep_qkv(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    qkv, slopes, ctx.count, cu_seqlens, ctx.silu = inputs
    ctx.save_for_backward(qkv, slopes, cu_seqlens)


def _differentiate_qkv(ctx: Any, do: torch.Tensor) -> tuple[MaybeTensor, ...]:
    qkv, slopes, cu_seqlens = ctx.saved_tensors
    return lightning_qkv_backward(qkv, slopes, ctx.count, cu_seqlens, ctx.silu, do), None, None, None, None


lightning_qkv.register_autograd(_differentiate_qkv, setup_context=_keep_qkv)


@registered(fake=lambda q, k, v, *_: dense_like(v), mutates=("pool",))
def lightning_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    count: int,
    cu_seqlens: MaybeTensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Outputs [T, H, D]; documents go on from their slots of `pool`, which move on in place."""
    from posttrain.kernels.lightning import launch

    documents = _documents(v.shape[0], count, cu_seqlens)
    with torch.cuda.device_of(v):
        return launch.forward(q, k, v, slopes, documents, initial=pool, final=pool, slots=slots)


@registered(fake=lambda q, k, v, *_: dense_like(v), mutates=("pool",))
def lightning_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    pool: torch.Tensor,
    slots: MaybeTensor,
    silu: bool,
) -> torch.Tensor:
    """Outputs [B, H, D] of one token for each sequence, q, k and v before SiLU with `silu`; states move on in place."""
    from posttrain.kernels.lightning.decode import decode

    with torch.cuda.device_of(v):
        return decode(q, k, v, slopes, pool, slots, silu=silu)
