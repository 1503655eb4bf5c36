"""The ends of lightning attention, gated RMSNorm and SiLU, written out in fp64, and errors against them. Needs no pytest."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.kernels.lightning.gated_norm import gated_rms_norm
from tests.kernels.accuracy import relative_rms

EPS = 1e-6


def exact_gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """sigmoid(gate) x / rms(x) weight of a row, by its formula, in the type given."""
    return weight * x / ((x * x).mean(dim=1, keepdim=True) + eps).sqrt() / (1 + torch.exp(-gate))


def exact_silu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x) by its formula, in the type given."""
    return x / (1 + torch.exp(-x))


def normal(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same at every call."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def norm_inputs(
    rows: int, width: int, dtype: torch.dtype, device: str = "cpu", weight_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """x as attention makes it (rows of different size), gate, weight about 1, and a gradient of the result."""
    x, gate, dy = (normal(rows, width, dtype=torch.float32, device=device, seed=seed) for seed in range(3))
    size = 10.0 ** normal(rows, 1, dtype=torch.float32, device=device, seed=3)
    weight = 1 + 0.3 * normal(width, dtype=torch.float32, device=device, seed=4)
    return (size * x).to(dtype), (2 * gate).to(dtype), weight.to(weight_dtype or dtype), dy.to(dtype)


def norm_results(function: Any, inputs: tuple[torch.Tensor, ...], **options: Any) -> dict[str, torch.Tensor]:
    """The result of `function(x, gate, weight, eps)` and its gradients, by name."""
    *leaves, dy = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, EPS, **options)
    grads = torch.autograd.grad(out, leaves, dy.to(out.dtype))
    return dict(zip(("y", "dx", "dgate", "dweight"), (out.detach(), *grads), strict=True))


def norm_errors(inputs: tuple[torch.Tensor, ...], backend: str) -> dict[str, float]:
    """Relative RMS errors of the result and the gradients against fp64; rows of dx count alike, whatever their size."""
    found = norm_results(gated_rms_norm, inputs, backend=backend)
    truth = norm_results(exact_gated_norm, tuple(x.double() for x in inputs))
    if truth["dx"].numel():
        rows = truth["dx"].norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        found["dx"], truth["dx"] = found["dx"].double() / rows, truth["dx"] / rows
    return {name: relative_rms(x, truth[name]) for name, x in found.items()}
