"""Sampled answers laid into packed rows for the policy update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from posttrain.stages.sampling import Answer


@dataclass(frozen=True)
class MicroBatch:
    """Prompt and answer of several samples, drawn at one temperature, as one row.

    Attributes:
        tokens: int64 [1, T].
        lengths: tokens of each document.
        temperature: the answers were drawn at.
        old_logprobs: fp32 [T], the engine's on sampled tokens, 0 elsewhere.
        advantages: fp32 [T], the sample's on each of its sampled tokens, 0 elsewhere.
        weights: fp32 [T], what the token weighs in the step's loss, 0 outside sampled tokens.
        mask: fp32 [T], 1 on sampled tokens.
    """

    tokens: torch.Tensor
    lengths: list[int]
    temperature: float
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, answers: Sequence[Answer], weights: Sequence[float], advantages: Sequence[float]) -> MicroBatch:
        """Join samples of one temperature."""
        per_token: dict[str, list[float]] = {"old_logprobs": [], "advantages": [], "weights": [], "mask": []}
        for answer, weight, advantage in zip(answers, weights, advantages, strict=True):
            prompt, sampled = len(answer.prompt_ids), len(answer.token_ids)
            per_token["old_logprobs"] += [0.0] * prompt + list(answer.logprobs)
            per_token["advantages"] += [0.0] * prompt + [advantage] * sampled
            per_token["weights"] += [0.0] * prompt + [weight] * sampled
            per_token["mask"] += [0.0] * prompt + [1.0] * sampled
        return cls(
            tokens=torch.tensor([[token for a in answers for token in (*a.prompt_ids, *a.token_ids)]], dtype=torch.int64),
            lengths=[_length(answer) for answer in answers],
            temperature=answers[0].temperature,
            **{name: torch.tensor(values, dtype=torch.float32) for name, values in per_token.items()},
        )

    @classmethod
    def idle(cls, answer: Answer) -> MicroBatch:
        """A batch that takes part in the exchange of gradients and adds nothing to them."""
        batch = cls.of([answer], [0.0], [0.0])
        return replace(batch, mask=torch.zeros_like(batch.mask), old_logprobs=torch.zeros_like(batch.old_logprobs))


def micro_batches(
    answers: Sequence[Answer], weights: Sequence[float], advantages: Sequence[float], taking_part: Sequence[int], budget: int
) -> list[MicroBatch]:
    """Samples in rows of at most `budget` tokens (a longer one alone), in order, temperature by temperature.

    Args:
        answers, weights, advantages: one of each a sample.
        taking_part: indices of the samples that are laid.
        budget: tokens of a row.
    """
    rows: list[list[int]] = []
    for temperature in sorted({answers[index].temperature for index in taking_part}):
        used = budget + 1
        for index in taking_part:
            if answers[index].temperature != temperature:
                continue
            if used + _length(answers[index]) > budget:
                rows.append([])
                used = 0
            rows[-1].append(index)
            used += _length(answers[index])
    return [MicroBatch.of(*([values[i] for i in row] for values in (answers, weights, advantages))) for row in rows]  # type: ignore[arg-type]


def _length(answer: Answer) -> int:
    return len(answer.prompt_ids) + len(answer.token_ids)
