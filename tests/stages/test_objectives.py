"""Objectives against numbers worked out by hand and against gradients from their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from posttrain.config.schema import RLStage
from posttrain.stages.objectives import OBJECTIVES, PolicyBatch, cispo, grpo, minimax01, sample_weights


def options(**fields: Any) -> RLStage:
    return RLStage.model_validate({"kind": "rl", "data": {"a": 1.0}, "steps": 1, **fields})


def batch(ratios: list[float], advantages: list[float], old: float = 0.5, ref: list[float] | None = None) -> PolicyBatch:
    """Tokens of probability `old * ratio` now, `old` when sampled."""
    new = torch.log(old * torch.tensor(ratios, dtype=torch.float64)).requires_grad_()
    return PolicyBatch(
        new_logprobs=new,
        old_logprobs=torch.full_like(new, math.log(old)).detach(),
        ref_logprobs=None if ref is None else torch.log(torch.tensor(ref, dtype=torch.float64)),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        mask=torch.ones_like(new).detach(),
    )


def gradients(loss: torch.Tensor, of: PolicyBatch) -> list[float]:
    (grad,) = torch.autograd.grad(loss.sum(), of.new_logprobs)
    return grad.tolist()


def test_grpo_loss_and_gradient_by_hand() -> None:
    # Inside the clip, above it, below it; each with either sign.
    given = batch([1.1, 1.5, 0.5, 1.1, 1.5, 0.5], [2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss = grpo(given, options(clip_ratio_low=0.2, clip_ratio_high=0.3))
    assert loss.tolist() == pytest.approx([-2.2, -2.6, -1.0, 2.2, 3.0, 1.6])
    # d ratio / d log pi = ratio; a token that is clipped has none.
    assert gradients(loss, given) == pytest.approx([-2.2, 0.0, -1.0, 2.2, 3.0, 0.0])


def test_minimax01_drops_negative_tokens_with_a_large_ratio_and_no_others() -> None:
    given = batch([1.9, 1.5, 1.9, 1.1], [-1.0, -1.0, 1.0, -1.0])
    loss = minimax01(given, options(negative_ratio_cap=1.8))
    assert loss.tolist() == pytest.approx([0.0, 1.5, -1.2, 1.1])
    assert gradients(loss, given) == pytest.approx([0.0, 1.5, 0.0, 1.1])
    assert grpo(given, options()).tolist()[0] == pytest.approx(1.9), "which plain GRPO keeps"


def test_minimax01_kl_gradient_is_the_difference_of_probabilities() -> None:
    given = batch([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], old=0.5, ref=[0.5, 0.2, 0.9])
    loss = minimax01(given, options(kl_coef=0.7))
    assert gradients(loss, given) == pytest.approx([0.0, 0.7 * 0.3, 0.7 * -0.4])


def test_grpo_kl_is_the_unbiased_estimator() -> None:
    given = batch([1.0, 1.0], [0.0, 0.0], old=0.5, ref=[0.5, 0.25])
    loss = grpo(given, options(objective="grpo", kl_coef=2.0))
    assert loss.tolist() == pytest.approx([0.0, 2.0 * (0.5 + math.log(2) - 1)])
    assert gradients(loss, given) == pytest.approx([0.0, 2.0 * (1 - 0.5)])


def test_cispo_caps_the_weight_and_keeps_every_gradient() -> None:
    given = batch([0.1, 1.0, 1.9], [1.0, -2.0, 1.0])
    loss = cispo(given, options(is_weight_cap=1.5))
    assert gradients(loss, given) == pytest.approx([-0.1, 2.0, -1.5])


def test_cispo_caps_absolutely_where_another_reading_would_add_one() -> None:
    given = batch([1.9], [1.0])
    assert gradients(cispo(given, options(is_weight_cap=1.2)), given) == pytest.approx([-1.2])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_all_objectives_have_the_policy_gradient(name: str) -> None:
    given = batch([1.0, 1.0], [1.5, -0.5])
    assert gradients(OBJECTIVES[name](given, options()), given) == pytest.approx([-1.5, 0.5])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tokens_outside_the_mask_add_nothing_whatever_their_numbers(name: str) -> None:
    new = torch.tensor([-1.0, -200.0], dtype=torch.float64, requires_grad=True)
    given = PolicyBatch(new, torch.tensor([-1.0, 0.0]), torch.tensor([-1.0, 0.0]), torch.ones(2), torch.tensor([1.0, 0.0]))
    loss = OBJECTIVES[name](given, options(kl_coef=0.1))
    assert loss[1] == 0
    assert gradients(loss, given)[1] == 0


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_beyond_float_range_gives_finite_gradients(name: str, advantage: float) -> None:
    new = torch.tensor([-0.1], dtype=torch.float32, requires_grad=True)
    given = PolicyBatch(new, torch.tensor([-200.0]), None, torch.tensor([advantage]), torch.ones(1))
    assert math.isfinite(gradients(OBJECTIVES[name](given, options()), given)[0])


def test_weights_of_grpo_treat_samples_alike_and_those_of_the_others_tokens() -> None:
    assert sample_weights("grpo", [1, 4]) == [0.5, 0.125]
    assert sample_weights("minimax01", [1, 4]) == sample_weights("cispo", [1, 4]) == [0.2, 0.2]
