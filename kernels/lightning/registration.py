"""The Triton kernels as `torch.library` operators, with fake and autograd implementations.

`posttrain::lightning` and `posttrain::lightning_qkv` differ in their inputs only: the second takes the projection's output
[T, H, 3 D] whole, so that its gradient is written where the projection's backward reads it, with no concatenation of three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from posttrain.kernels.lightning.launch import Documents

MaybeTensor = torch.Tensor | None


def _documents(tokens: int, count: int, cu_seqlens: MaybeTensor) -> Documents:
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


def _dense_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op(
    "posttrain::lightning",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor slopes, int count, Tensor? cu_seqlens, Tensor? initial, bool want_final)"
    " -> (Tensor, Tensor)",
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
    """Outputs [T, H, D] and final states; documents by `cu_seqlens`, or `count` of equal length."""
    from posttrain.kernels.lightning import launch

    final = _empty_states(v, count, cu_seqlens, want_final)
    documents = _documents(v.shape[0], count, cu_seqlens)
    with torch.cuda.device_of(v):
        out = launch.forward(q, k, v, slopes, documents, initial=initial, final=final if want_final else None)
    return out, final


@lightning.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    count: int,
    cu_seqlens: MaybeTensor,
    initial: MaybeTensor,
    want_final: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _dense_like(v), _empty_states(v, count, cu_seqlens, want_final)


@torch.library.custom_op(
    "posttrain::lightning_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor slopes, int count, Tensor? cu_seqlens, Tensor? initial, Tensor do,"
    " Tensor? final_grad) -> (Tensor, Tensor, Tensor, Tensor)",
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

    grads = _dense_like(q), _dense_like(k), _dense_like(v)
    initial_grad = _empty_states(v, count, cu_seqlens, initial is not None)
    with torch.cuda.device_of(v):
        launch.backward(
            *(q, k, v, slopes, _documents(v.shape[0], count, cu_seqlens), do, grads),
            initial=initial,
            final_grad=final_grad,
            initial_grad=initial_grad if initial is not None else None,
        )
    return *grads, initial_grad


@lightning_backward.register_fake
def _(
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
    return _dense_like(q), _dense_like(k), _dense_like(v), _empty_states(v, count, cu_seqlens, initial is not None)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, slopes, ctx.count, cu_seqlens, initial, ctx.want_final = inputs
    ctx.save_for_backward(q, k, v, slopes, cu_seqlens, initial)


def _differentiate(ctx: Any, do: torch.Tensor, final_grad: torch.Tensor) -> tuple[MaybeTensor, ...]:
    q, k, v, slopes, cu_seqlens, initial = ctx.saved_tensors
    end = final_grad.contiguous() if ctx.want_final else None
    dq, dk, dv, start = lightning_backward(q, k, v, slopes, ctx.count, cu_seqlens, initial, do, end)
    return dq, dk, dv, None, None, None, start if initial is not None else None, None


lightning.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op(
    "posttrain::lightning_qkv",
    mutates_args=(),
    schema="(Tensor qkv, Tensor slopes, int count, Tensor? cu_seqlens) -> Tensor",
)
def lightning_qkv(qkv: torch.Tensor, slopes: torch.Tensor, count: int, cu_seqlens: MaybeTensor) -> torch.Tensor:
    """Outputs [T, H, D] of qkv [T, H, 3 D], every head's q, k and v side by side; documents begin with zero states."""
    from posttrain.kernels.lightning import launch

    q, k, v = qkv.chunk(3, dim=-1)
    with torch.cuda.device_of(v):
        return launch.forward(q, k, v, slopes, _documents(v.shape[0], count, cu_seqlens))


@lightning_qkv.register_fake
def _(qkv: torch.Tensor, slopes: torch.Tensor, count: int, cu_seqlens: MaybeTensor) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


@torch.library.custom_op(
    "posttrain::lightning_qkv_backward",
    mutates_args=(),
    schema="(Tensor qkv, Tensor slopes, int count, Tensor? cu_seqlens, Tensor do) -> Tensor",
)
def lightning_qkv_backward(
    qkv: torch.Tensor, slopes: torch.Tensor, count: int, cu_seqlens: MaybeTensor, do: torch.Tensor
) -> torch.Tensor:
    """Gradient of qkv, [T, H, 3 D], written in place by the walks."""
    from posttrain.kernels.lightning import launch

    grad = _dense_like(qkv)
    q, k, v = qkv.chunk(3, dim=-1)
    dq, dk, dv = grad.chunk(3, dim=-1)
    with torch.cuda.device_of(v):
        launch.backward(q, k, v, slopes, _documents(v.shape[0], count, cu_seqlens), do, (dq, dk, dv))
    return grad


@lightning_qkv_backward.register_fake
def _(qkv: torch.Tensor, slopes: torch.Tensor, count: int, cu_seqlens: MaybeTensor, do: torch.Tensor) -> torch.Tensor:
    return _dense_like(qkv)


def _keep_qkv(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    qkv, slopes, ctx.count, cu_seqlens = inputs
    ctx.save_for_backward(qkv, slopes, cu_seqlens)


def _differentiate_qkv(ctx: Any, do: torch.Tensor) -> tuple[MaybeTensor, ...]:
    qkv, slopes, cu_seqlens = ctx.saved_tensors
    return lightning_qkv_backward(qkv, slopes, ctx.count, cu_seqlens, do), None, None, None


lightning_qkv.register_autograd(_differentiate_qkv, setup_context=_keep_qkv)


@torch.library.custom_op(
    "posttrain::lightning_prefill",
    mutates_args=("pool",),
    schema="(Tensor q, Tensor k, Tensor v, Tensor slopes, int count, Tensor? cu_seqlens, Tensor(a!) pool, Tensor slots)"
    " -> Tensor",
)
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


@lightning_prefill.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    count: int,
    cu_seqlens: MaybeTensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    return _dense_like(v)


@torch.library.custom_op(
    "posttrain::lightning_decode",
    mutates_args=("pool",),
    schema="(Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor(a!) pool, Tensor? slots) -> Tensor",
)
def lightning_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, pool: torch.Tensor, slots: MaybeTensor
) -> torch.Tensor:
    """Outputs [B, H, D] of one token for each sequence; states move on in place."""
    from posttrain.kernels.lightning.decode import decode

    with torch.cuda.device_of(v):
        return decode(q, k, v, slopes, pool, slots)


@lightning_decode.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, pool: torch.Tensor, slots: MaybeTensor
) -> torch.Tensor:
    return _dense_like(v)
