"""Properties of advantages."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.stages.advantages import MAX_BALANCE, balance, group_advantages

rewards = st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


def flat(groups: list[list[float]]) -> torch.Tensor:
    return torch.tensor(groups, dtype=torch.float64).flatten()


@given(rewards)
def test_a_group_sums_to_zero(groups: list[list[float]]) -> None:
    for scale in (False, True):
        sums = group_advantages(flat(groups), 4, scale).view(-1, 4).sum(dim=1)
        assert sums.abs().max() < 1e-6


@given(rewards, st.floats(0.1, 10), st.floats(-5, 5))
def test_scaled_advantages_ignore_a_rescaled_reward_up_to_the_floor_of_the_deviation(
    groups: list[list[float]], factor: float, shift: float
) -> None:
    values = flat(groups).round(decimals=2)
    before, after = group_advantages(values, 4, True), group_advantages(values * factor + shift, 4, True)
    assert torch.allclose(before, after, atol=1e-6)


def test_equal_rewards_give_exact_zeros() -> None:
    values = torch.tensor([0.1] * 3 + [0.7] * 3, dtype=torch.float32)
    for scale in (False, True):
        assert group_advantages(values, 3, scale).eq(0).all()


def test_by_hand() -> None:
    values = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert group_advantages(values, 4, False).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert torch.allclose(group_advantages(values, 4, True), torch.tensor([3, -1, -1, -1], dtype=torch.float64) / 3**0.5)


@given(rewards, st.integers(0, 1000))
def test_balanced_signs_weigh_the_same_unless_capped(groups: list[list[float]], seed: int) -> None:
    advantages = group_advantages(flat(groups).round(decimals=2), 4, False)
    weights = torch.rand(len(advantages), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    balanced = balance(advantages, weights)
    assert (balanced.sign() == advantages.sign()).all()
    assert (balanced.abs() <= MAX_BALANCE * advantages.abs() + 1e-12).all()
    factors = balanced[advantages != 0] / advantages[advantages != 0]
    if len(factors) and factors.max() < MAX_BALANCE - 1e-9:
        assert abs(float((weights * balanced).sum())) < 1e-9
        assert torch.isclose((weights * balanced.abs()).sum(), (weights * advantages.abs()).sum())


def test_one_sign_alone_stays_as_it_is() -> None:
    values = torch.tensor([0.5, 0.0], dtype=torch.float64)
    assert torch.equal(balance(values, torch.ones(2, dtype=torch.float64)), values)
