"""Where a process computes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def default_device() -> torch.device:
    """The process's GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def placed(model: M) -> M:
    """The model, moved to the default device."""
    return nn.Module.to(model, default_device())
