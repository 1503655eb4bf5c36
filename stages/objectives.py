"""Policy objectives of online RL: pure functions from log-probabilities and advantages to per-token losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from posttrain.config.schema import RLStage


@dataclass(frozen=True)
class PolicyBatch:
    """Tokens of one or more samples, all tensors [T].

    Attributes:
        new_logprobs: under the weights being trained; carries the gradient.
        old_logprobs: under the weights that sampled, as the engine reported them.
        ref_logprobs: under the reference model, or None without a KL term.
        advantages: the sample's advantage on each of its tokens.
        mask: 1 on sampled tokens, 0 elsewhere.
    """

    new_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    mask: torch.Tensor

    def ratio(self) -> torch.Tensor:
        """Probability of each token now over that when it was sampled, r = pi / pi_old, within exp(+-20); 1 outside the mask.

        The bound keeps infinity, and with it NaN gradients, out of tokens that the objectives drop or clip anyway.
        """
        return torch.exp(torch.where(self.mask > 0, self.new_logprobs - self.old_logprobs, 0.0).clamp(-20.0, 20.0))


def minimax01(batch: PolicyBatch, options: RLStage) -> torch.Tensor:
    """Loss of the paper's modified GRPO, per token [T]:

        -min(r A, clip(r, 1 - low, 1 + high) A) * [not (A < 0 and r > cap)] + kl_coef * SG(pi - pi_ref) * log pi

    The clipped objective alone leaves a negative advantage with a large ratio unbounded: such tokens leave the loss. The
    KL term's gradient, (pi - pi_ref) grad log pi, vanishes where both models agree and is bounded per token by 1.

    Source: MiniMax-01 paper section 5.4.2 ("importance sampling weight clipping", "KL divergence optimization").
    """
    ratio = batch.ratio()
    kept = ~((batch.advantages < 0) & (ratio.detach() > options.negative_ratio_cap))
    loss = torch.where(kept, -_clipped(ratio, batch.advantages, options), 0.0)
    if batch.ref_logprobs is not None:
        gap = (batch.new_logprobs.exp() - batch.ref_logprobs.exp()).detach()
        loss = loss + options.kl_coef * gap * batch.new_logprobs
    return loss * batch.mask


def grpo(batch: PolicyBatch, options: RLStage) -> torch.Tensor:
    """Loss of plain GRPO, per token [T]:

        -min(r A, clip(r, 1 - low, 1 + high) A) + kl_coef * (pi_ref / pi - log(pi_ref / pi) - 1)

    Source: DeepSeekMath equations 3 and 4.
    """
    loss = -_clipped(batch.ratio(), batch.advantages, options)
    if batch.ref_logprobs is not None:
        gap = torch.where(batch.mask > 0, batch.ref_logprobs - batch.new_logprobs, 0.0)
        loss = loss + options.kl_coef * (gap.exp() - gap - 1)
    return loss * batch.mask


def cispo(batch: PolicyBatch, options: RLStage) -> torch.Tensor:
    """Loss of CISPO, per token [T]:

        -SG(min(r, is_weight_cap)) A log pi

    The weight is capped, not the token: every token keeps its gradient. There is no lower bound and no KL term.

    Source: MiniMax-M1 equations 4 and 5.
    """
    weight = batch.ratio().detach().clamp(max=options.is_weight_cap)
    return -weight * batch.advantages * batch.new_logprobs * batch.mask


OBJECTIVES: dict[str, Callable[[PolicyBatch, RLStage], torch.Tensor]] = {"minimax01": minimax01, "grpo": grpo, "cispo": cispo}


def sample_weights(objective: str, lengths: Sequence[int]) -> list[float]:
    """What each token of a sample weighs in the step's loss, for samples of the given numbers of sampled tokens.

    grpo: 1 / (samples * length), every sample weighs the same (DeepSeekMath equation 3). Others: 1 / all tokens, every
    token weighs the same (MiniMax-M1 equation 4; not printed for MiniMax-01).
    """
    if objective == "grpo":
        return [1.0 / (len(lengths) * length) for length in lengths]
    return [1.0 / sum(lengths)] * len(lengths)


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, options: RLStage) -> torch.Tensor:
    clipped = ratio.clamp(1 - options.clip_ratio_low, 1 + options.clip_ratio_high)
    return torch.minimum(ratio * advantages, clipped * advantages)
