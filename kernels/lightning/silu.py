"""SiLU, x sigmoid(x), around the walks: of the projection before them, and in the gradient after them.

The passes are torch's. They move their bytes at the bandwidth of a copy, and kernels of our own were measured no faster; decoding
alone applies SiLU as it loads.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["silu"] | None


def is_silu(activation: Activation) -> bool:
    """Whether there is an activation; ValueError for one that is not known."""
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    return activation is not None


def activated(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """SiLU of x, or x itself for None; differentiable. ValueError for another activation."""
    return F.silu(x) if is_silu(activation) else x


def silu_backward(x: torch.Tensor, grad: torch.Tensor) -> None:
    """Turns the gradient with respect to silu(x) into the one with respect to x, in place: no third tensor of that size."""
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
