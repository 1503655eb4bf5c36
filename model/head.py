"""The LM head, always computed in fp32, and log-probabilities that never hold tokens x vocabulary at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from posttrain.model.layers import compute_dtype

CHUNK_TOKENS = 2048
"""Tokens whose logits are held at a time."""


class LMHead(nn.Module):
    """Logits in fp32 for weights of any type (MiniMax-M1 section 3.2: engines and trainers differ most in the head)."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """Logits [T, V]; with targets [T], instead the log-probability [T] of each under softmax(logits / temperature)."""
        if targets is not None:
            return _ChunkedLogprobs.apply(hidden, self.weight, targets, temperature)
        compute = compute_dtype(hidden)
        return hidden.to(compute) @ self.weight.to(compute).T


class _ChunkedLogprobs(torch.autograd.Function):
    """Forward keeps the log-sum-exp of every token; backward computes the logits of a chunk again."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        compute = compute_dtype(hidden)
        matrix = weight.to(compute)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=compute)
        normalisers = torch.empty_like(logprobs)
        for rows in _chunks(hidden.shape[0]):
            logits = hidden[rows].to(compute) @ matrix.T / temperature
            normalisers[rows] = logits.logsumexp(dim=-1)
            logprobs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normalisers[rows]
        ctx.save_for_backward(hidden, weight, targets, normalisers)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (grad,) = grads
        hidden, weight, targets, normalisers = ctx.saved_tensors
        matrix = weight.to(grad.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(matrix)
        for rows in _chunks(hidden.shape[0]):
            inputs = hidden[rows].to(grad.dtype)
            slope = -torch.exp(inputs @ matrix.T / ctx.temperature - normalisers[rows, None])
            slope.scatter_add_(1, targets[rows, None], torch.ones_like(slope[:, :1]))
            slope *= grad[rows, None] / ctx.temperature
            grad_hidden[rows] = (slope @ matrix).to(hidden.dtype)
            grad_weight += slope.T @ inputs
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _chunks(total: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_TOKENS, total)) for start in range(0, total, CHUNK_TOKENS)]
