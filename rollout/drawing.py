"""Drawing the next token of every row: one definition, so that all engines draw the same tokens from the same weights."""

from __future__ import annotations

import torch

from posttrain.rollout.noise import uniform


def sample(
    logits: torch.Tensor, seeds: torch.Tensor, temperature: torch.Tensor, position: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token [B] and its log-probability [B] for rows of logits [B, V]; temperature 0 is greedy, scored at 1.

    Inverse-CDF sampling: the row's uniform number falls into the token whose share of the cumulated probability holds it.
    """
    greedy = temperature == 0
    if bool(greedy.all()):  # saves the cumulated probabilities, half of the work on a large vocabulary
        tokens = logits.argmax(dim=-1)
        return tokens, logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=-1)
    scaled = logits / torch.where(greedy, 1.0, temperature).to(logits.dtype)[:, None]
    logprobs = scaled.log_softmax(dim=-1)
    cumulated = logprobs.exp().to(torch.float64).cumsum(dim=-1)
    target = uniform(seeds, position)[:, None] * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, logits.argmax(dim=-1), drawn)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
