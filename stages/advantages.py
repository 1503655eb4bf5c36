"""From rewards to advantages."""

from __future__ import annotations

import torch

MAX_BALANCE = 4.0
"""Largest factor that balancing applies to either sign."""


def group_advantages(rewards: torch.Tensor, group_size: int, scale: bool, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Reward minus the mean of its group.

    Args:
        rewards: fp32 or fp64 [groups * group_size], samples of a prompt side by side.
        group_size: samples of a prompt.
        scale: divide by the group's standard deviation (DeepSeekMath section 4.1.2 does; "Understanding R1-Zero-Like
            Training" section 3.1 shows that it favours prompts that are nearly always right or wrong).
        kept: bool like rewards; samples outside get 0 and count in no mean or deviation. None keeps all.

    Returns:
        Advantages like rewards. A group of equal rewards gets zeros.
    """
    if kept is not None and not kept.all():
        groups, inside = rewards.view(-1, group_size), kept.view(-1, group_size)
        rows = [_of_kept(group, mask, scale) for group, mask in zip(groups, inside, strict=True)]
        return torch.stack(rows).flatten()
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    # Equal rewards leave rounding noise of the mean behind, which scaling would blow up.
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    if scale:
        centred = centred / groups.std(dim=1, keepdim=True, correction=0).clamp(min=1e-6)
    return torch.where(equal, 0.0, centred).flatten()


def _of_kept(group: torch.Tensor, kept: torch.Tensor, scale: bool) -> torch.Tensor:
    """Advantages of one group, 0 outside the mask."""
    advantages = torch.zeros_like(group)
    if kept.any():
        advantages[kept] = group_advantages(group[kept], int(kept.sum()), scale)
    return advantages


def balance(advantages: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scale positive and negative advantages so that both signs weigh the same, keeping the total weight.

    With P and N the weighted sums of |advantage| of either sign, positives are multiplied by (P + N) / 2P and negatives
    by (P + N) / 2N, each at most `MAX_BALANCE`; if one sign is absent nothing changes.

    Args:
        advantages: [samples].
        weights: non-negative [samples], what a sample weighs in the loss (its trained tokens, or 1).

    Source: MiniMax-01 paper section 5.4.2 asks for balanced reward contributions and prints no formula; this one is ours.
    """
    positive = (weights * advantages.clamp(min=0)).sum()
    negative = (weights * (-advantages).clamp(min=0)).sum()
    if positive == 0 or negative == 0:
        return advantages
    half = (positive + negative) / 2
    up, down = (half / positive).clamp(max=MAX_BALANCE), (half / negative).clamp(max=MAX_BALANCE)
    return torch.where(advantages > 0, advantages * up, advantages * down)
