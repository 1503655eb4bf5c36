"""RMSNorm over all heads with the output gate, sigmoid(gate) * RMSNorm(x): in one kernel on a GPU, by torch elsewhere."""
# No `from __future__ import annotations`: operators' schemas are read from the annotations.

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from posttrain.config.errors import UserError
from posttrain.kernels.lightning.registration import dense_like, registered

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto"
) -> torch.Tensor:
    """y = sigmoid(gate) * x / sqrt(mean(x^2) + eps) * weight, the mean over a row; differentiable in x, gate and weight.

    `triton` computes in fp32 throughout and rounds once. `torch` is the chain of torch's functions, with their roundings: the
    normalised row to the type of x, then its product with the weight, then the sigmoid, then the result. fp64 is computed in
    fp64. Nothing but the inputs is kept for the backward pass of `triton`.

    Args:
        x: [T, W], bf16, fp16, fp32 or fp64, any strides.
        gate: [T, W], before the sigmoid.
        weight: [W].
        eps: added to the mean of squares.
        backend: `triton` (NVIDIA GPUs, rows of at most 32,768 numbers, no fp64), `torch`, or `auto` for the first that can run.

    Returns:
        [T, W] in the type that x and gate promote to.

    Raises:
        ValueError: shapes, types or devices do not fit together.
        UserError: there is no such backend, or it cannot run these tensors.

    Source: MiniMax-01 paper section 2.2.1 and the released modelling code.
    """
    _check(x, gate, weight)
    if backend not in BACKENDS:
        raise UserError(f"unknown gated norm backend {backend!r}", instead=f"write one of {', '.join(BACKENDS)}")
    if backend != "torch":
        obstacle = _found_obstacle(x.device.type, (x.dtype, gate.dtype, weight.dtype), x.shape[1])
        if obstacle is None:
            return gated_rms_norm_forward(x, gate, weight.contiguous(), eps)
        if backend == "triton":
            raise UserError(f"gated norm backend 'triton' cannot run: {obstacle}", instead="write 'auto' or 'torch'")
    return _by_torch(x, gate, weight, eps)


def _by_torch(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    opening = torch.sigmoid(gate)
    if x.dtype == compute == weight.dtype:
        normal = F.rms_norm(x, weight.shape, weight, eps)
    else:
        normal = F.rms_norm(x.to(compute), weight.shape, None, eps).to(x.dtype) * weight
    return (opening * normal).to(torch.promote_types(x.dtype, gate.dtype))


# torch.compile takes the answer and does not trace the search for it.
@torch.compiler.assume_constant_result
def _found_obstacle(device: str, dtypes: tuple[torch.dtype, ...], width: int) -> str | None:
    return _obstacle(device, dtypes, width)


@functools.cache
def _obstacle(device: str, dtypes: tuple[torch.dtype, ...], width: int) -> str | None:
    """Why the kernels cannot run such tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from posttrain.kernels.lightning.gated_norm_kernels import MAX_WIDTH
    from posttrain.kernels.lightning.launch import INTERPRETED

    if device != "cuda" and not INTERPRETED:
        return f"the tensors are on {device}, not on a GPU"
    if not set(dtypes) <= set(DTYPES):
        return f"it computes {', '.join(map(str, DTYPES))}, not {', '.join(map(str, dtypes))}"
    if width > MAX_WIDTH:
        return f"it has rows of at most {MAX_WIDTH} numbers, not {width}"
    return None


def _check(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError, in one line, for what the kernels would read wrongly."""
    if x.dim() != 2 or gate.shape != x.shape or weight.shape != x.shape[1:]:
        raise ValueError(f"x and gate must be [T, W], weight [W], got {[list(t.shape) for t in (x, gate, weight)]}")
    if any(not t.is_floating_point() or t.device != x.device for t in (x, gate, weight)):
        raise ValueError(
            f"x, gate and weight must be floating and on one device, got {[(t.dtype, str(t.device)) for t in (x, gate, weight)]}"
        )


@registered(fake=lambda x, gate, *_: dense_like(x, torch.promote_types(x.dtype, gate.dtype)))
def gated_rms_norm_forward(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The operator behind `gated_rms_norm`, for tensors that the kernels can run."""
    from posttrain.kernels.lightning.gated_norm_kernels import gated_norm

    with torch.cuda.device_of(x):
        return gated_norm(x, gate, weight, eps)


@registered(fake=lambda x, gate, weight, *_: (dense_like(x), dense_like(gate), dense_like(weight)))
def gated_rms_norm_backward(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, gate [T, W] and weight [W]."""
    from posttrain.kernels.lightning.gated_norm_kernels import gated_norm_backward

    with torch.cuda.device_of(x):
        return gated_norm_backward(x, gate, weight, eps, dy)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, gate, weight, ctx.eps = inputs
    ctx.save_for_backward(x, gate, weight)


def _differentiate(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    return *gated_rms_norm_backward(x, gate, weight, ctx.eps, dy), None


gated_rms_norm_forward.register_autograd(_differentiate, setup_context=_keep)
