"""The small parts: RMSNorm, half rotary embedding, decay slopes."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in fp32 (fp64 for fp64 input)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        compute = compute_dtype(x)
        if x.dtype == compute == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.to(compute), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """fp64 for fp64 tensors, fp32 for all others: what states, decays, router and head are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def full_precision(x: torch.Tensor) -> torch.autocast:
    """A context in which no autocast touches matrix products on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


class Float32Linear(nn.Linear):
    """A linear layer computed in fp32 (fp64 for fp64 input) from weights of any type: router and score."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in `compute_dtype`, under autocast too."""
        compute = compute_dtype(x)
        with full_precision(x):
            return F.linear(x.to(compute), self.weight.to(compute))


def lightning_slopes(num_heads: int, layer: int, num_layers: int) -> list[float]:
    """Decay rate of every head of a lightning layer.

    ALiBi's series 2^(-8h/H), interpolated where H is no power of two, falls linearly over all layers (softmax layers
    counted) to 1e-5 of itself. A single layer keeps the full rate, where the released code divides by zero.

    Source: released modelling code (`MiniMaxText01LightningAttention`), MiniMax-01 paper section 2.2.
    """

    def series(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    power = 2 ** math.floor(math.log2(num_heads))
    rates = series(power)
    if power < num_heads:
        rates += series(2 * power)[0::2][: num_heads - power]
    depth = layer / (num_layers - 1) if num_layers > 1 else 0.0
    return [rate * (1 - depth + 1e-5) for rate in rates]


def rotary_tables(
    positions: torch.Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, [T, rotary_dim / 2], computed in fp64 and rounded once.

    Position times frequency in fp32 is off by 0.06 rad at a million tokens, so the product is taken in fp64.
    """
    angle = positions.to(torch.float64)[:, None] * _frequencies(rotary_dim, theta, positions.device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


# Remembered tensors serve training too, which refuses those made in inference mode.
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _frequencies(rotary_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Radians a position of every pair of dimensions, fp64 [rotary_dim / 2]."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    return theta**-exponent


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the leading 2 * R dimensions of every head, pairing i with i + R; the rest passes through.

    Args:
        x: [T, heads, head_dim].
        cos, sin: [T, R].
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second, rest = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype), x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
