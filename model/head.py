"""The LM head, always computed in fp32, and log-probabilities that never hold tokens x vocabulary at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from posttrain.model.layers import compute_dtype, full_precision

CHUNK_TOKENS = 2048
"""Most tokens whose logits are held at a time."""

CHUNK_LOGITS = 1 << 25
"""Most logits held at a time, 128 MiB in fp32: 167 tokens of the released vocabulary. The backward pass holds two such."""


class LMHead(nn.Module):
    """Logits in fp32 for weights of any type, under autocast too.

    MiniMax-M1 section 3.2: engines and trainers differ most in the head.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.register_parameter("bias", None)  # TRL's own head reads it

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> Any:
        """Logits [..., V]; with targets [T], instead the log-probability [T] of each under softmax(logits / temperature).

        `with_entropy`, a pair: log-probabilities, and the entropy [T] in nats of the distribution that each target is drawn
        from. Both are differentiable. It is one method because hooks that gather a sharded weight watch its call.
        """
        if targets is not None:
            logprobs, entropy = _ChunkedLogprobs.apply(hidden, self.weight, targets, temperature, with_entropy)
            return (logprobs, entropy) if with_entropy else logprobs
        compute = compute_dtype(hidden)
        with full_precision(hidden):
            return hidden.to(compute) @ self.weight.to(compute).T


class _ChunkedLogprobs(torch.autograd.Function):
    """Forward keeps the log-sum-exp (and the entropy) of every token; backward computes the logits of a chunk again.

    The one path for every device. torch's `linear_cross_entropy` (from 2.13 on) and Liger's fused loss take hidden states and
    weights of one type and give a reduced loss: no log-probability of each token, no entropy, no temperature, no fp32 logits
    from bf16 weights. torch's is not faster either: 4,096 tokens of width 512 and 32,000 words, forward and backward on one
    shared core, took 10 to 13 s and 470 MB here, 11 to 12 s and 220 MB in `linear_cross_entropy` by chunks; plain cross-entropy
    held 1,520 MB. Liger's was not measured.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        compute = compute_dtype(hidden)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=compute)
        normalisers = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        with full_precision(hidden):
            matrix = weight.to(compute)
            for rows in _chunks(hidden.shape[0], weight.shape[0]):
                logits = (hidden[rows].to(compute) @ matrix.T).div_(temperature)
                normalisers[rows] = logits.logsumexp(dim=-1)
                logprobs[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - normalisers[rows]
                if entropy is not None:
                    likelihood = torch.exp(logits - normalisers[rows, None])
                    entropy[rows] = normalisers[rows] - likelihood.mul_(logits).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, targets, normalisers, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, normalisers, entropy = ctx.saved_tensors
        of_logprobs, of_entropy = grads
        if of_logprobs is None and of_entropy is None:
            return None, None, None, None, None
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        with full_precision(hidden):
            matrix = weight.to(normalisers.dtype)
            grad_weight = torch.zeros_like(matrix) if need_weight else None
            for rows in _chunks(hidden.shape[0], weight.shape[0]):
                inputs = hidden[rows].to(matrix.dtype)
                logprobs = (inputs @ matrix.T).div_(ctx.temperature).sub_(normalisers[rows, None])
                likelihood = logprobs.exp()
                # d logprob / d logit_v = [v is the target] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy)
                if of_entropy is not None:
                    logprobs.add_(entropy[rows, None]).mul_(likelihood).mul_(-of_entropy[rows, None])
                if of_logprobs is not None:
                    likelihood.mul_(-of_logprobs[rows, None])
                    likelihood.scatter_add_(1, targets[rows, None], of_logprobs[rows, None])
                slope = logprobs if of_logprobs is None else likelihood if of_entropy is None else likelihood.add_(logprobs)
                slope.div_(ctx.temperature)
                if grad_hidden is not None:
                    grad_hidden[rows] = (slope @ matrix).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(slope.T, inputs)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(total: int, vocabulary: int) -> list[slice]:
    size = max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
