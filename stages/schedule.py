"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from posttrain.config.schema import OptimSection


def learning_rate(step: int, steps: int, optim: OptimSection) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`.

    Rises linearly over `warmup_steps` (the first step takes 1 / warmup_steps of the highest), then stays, or falls along
    half a cosine to `min_learning_rate` at the last step.
    """
    top = optim.learning_rate
    if step < optim.warmup_steps:
        return top * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return top
    span = max(steps - 1 - optim.warmup_steps, 1)
    progress = min((step - optim.warmup_steps) / span, 1.0)
    return optim.min_learning_rate + (top - optim.min_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))
