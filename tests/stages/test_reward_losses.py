"""Losses of several heads, against sums written out number by number in double precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from posttrain.stages.reward_losses import centring_loss, grade_loss, preference_loss, tie_loss

PAIRS, TARGETS, MEMBERS = 7, 3, 4


def numbers(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def booleans(seed: int, *shape: int) -> torch.Tensor:
    drawn = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    drawn[0] = False  # an item that names nothing
    return drawn


def counts(seed: int, *shape: int) -> torch.Tensor:
    return torch.poisson(torch.ones(*shape, dtype=torch.float64), generator=torch.Generator().manual_seed(seed))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(0, PAIRS, TARGETS, MEMBERS), numbers(1, PAIRS, TARGETS, MEMBERS)


def test_preference_loss_is_the_sum_written_out() -> None:
    (chosen, rejected), differs, weights = scores(), booleans(2, PAIRS, TARGETS), counts(3, PAIRS, MEMBERS)
    margins, noise, scale = torch.rand(PAIRS, TARGETS, generator=torch.Generator().manual_seed(4)).double(), 0.2, 1.5
    found = preference_loss(chosen, rejected, differs, margins, weights, margin_scale=scale, label_noise=noise)
    assert differs.any(dim=1).any()
    for p in range(PAIRS):
        named = [t for t in range(TARGETS) if differs[p, t]]
        total = 0.0
        for t in named:
            for m in range(MEMBERS):
                z = float(chosen[p, t, m] - rejected[p, t, m]) - scale * float(margins[p, t])
                total -= float(weights[p, m]) * ((1 - noise) * log_sigmoid(z) + noise * log_sigmoid(-z))
        assert float(found[p]) == pytest.approx(total / (MEMBERS * max(len(named), 1)), rel=1e-12)


def test_one_head_on_plain_pairs_has_the_loss_that_trl_computes() -> None:
    chosen, rejected = numbers(5, 9, 1, 1), numbers(6, 9, 1, 1)
    yes, one = torch.ones(9, 1, dtype=torch.bool), torch.ones(9, 1, dtype=torch.float64)
    ours = preference_loss(chosen, rejected, yes, 0 * one, one) + 0.3 * centring_loss(chosen, rejected, yes)
    flat, other = chosen.flatten(), rejected.flatten()
    theirs = -F.logsigmoid(flat - other).mean() + 0.3 * torch.mean((flat + other) ** 2)
    assert float(ours.mean()) == pytest.approx(float(theirs), rel=1e-14)


def test_centring_and_grades_are_the_sums_written_out() -> None:
    (chosen, rejected), named, weights = scores(), booleans(7, PAIRS, TARGETS), counts(8, PAIRS, MEMBERS)
    grades = torch.rand(PAIRS, TARGETS, generator=torch.Generator().manual_seed(9)).double()
    centred, graded = centring_loss(chosen, rejected, named), grade_loss(chosen, grades, named, weights)
    for p in range(PAIRS):
        cells = [(t, m) for t in range(TARGETS) if named[p, t] for m in range(MEMBERS)]
        squares = sum(float(chosen[p, t, m] + rejected[p, t, m]) ** 2 for t, m in cells)
        entropy = -sum(
            float(weights[p, m])
            * (
                float(grades[p, t]) * log_sigmoid(float(chosen[p, t, m]))
                + (1 - float(grades[p, t])) * log_sigmoid(-float(chosen[p, t, m]))
            )
            for t, m in cells
        )
        assert float(centred[p]) == pytest.approx(squares / max(len(cells), 1), rel=1e-12)
        assert float(graded[p]) == pytest.approx(entropy / max(len(cells), 1), rel=1e-12)


@given(st.integers(0, 10_000), st.floats(0, 0.49))
def test_swapped_answers_have_the_mirrored_loss(seed: int, noise: float) -> None:
    chosen, rejected = numbers(seed, 3, 2, 2), numbers(seed + 1, 3, 2, 2)
    differs, weights, zero = booleans(seed + 2, 3, 2), counts(seed + 3, 3, 2), torch.zeros(3, 2, dtype=torch.float64)
    one = preference_loss(chosen, rejected, differs, zero, weights, label_noise=noise)
    swapped = preference_loss(rejected, chosen, differs, zero, weights, label_noise=1 - noise)
    torch.testing.assert_close(one, swapped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        tie_loss(chosen, rejected, differs, weights), tie_loss(rejected, chosen, differs, weights), rtol=1e-12, atol=1e-12
    )
    half = preference_loss(chosen, rejected, differs, zero, weights, label_noise=0.5)
    torch.testing.assert_close(tie_loss(chosen, rejected, differs, weights), half, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10_000))
def test_no_gradient_reaches_a_head_that_is_not_named_or_counts_nothing(seed: int) -> None:
    chosen = numbers(seed, 4, 3, 2).requires_grad_()
    rejected = numbers(seed + 1, 4, 3, 2).requires_grad_()
    named, weights = booleans(seed + 2, 4, 3), counts(seed + 3, 4, 2)
    margins = torch.full((4, 3), 0.5, dtype=torch.float64)
    losses = {
        "preference": preference_loss(chosen, rejected, named, margins, weights, margin_scale=1.0, label_noise=0.1),
        "tie": tie_loss(chosen, rejected, named, weights),
        "grade": grade_loss(chosen, margins, named, weights),
    }
    for loss in losses.values():
        (gradient,) = torch.autograd.grad(loss.sum(), chosen, retain_graph=True)
        silent = ~named[..., None] | (weights == 0)[:, None, :]
        assert (gradient[silent.expand_as(gradient)] == 0).all()
    (gradient,) = torch.autograd.grad(centring_loss(chosen, rejected, named).sum(), chosen)
    assert (gradient[~named] == 0).all()


def test_a_tie_is_best_where_heads_are_equal_and_a_margin_asks_for_a_lead() -> None:
    equal, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.float64)
    leads = torch.linspace(-4, 4, 81, dtype=torch.float64).view(-1, 1, 1)
    tied = torch.stack([tie_loss(lead[None], torch.zeros(1, 1, 1).double(), equal, one)[0] for lead in leads])
    assert int(tied.argmin()) == 40 and float(tied.min()) == pytest.approx(math.log(2), rel=1e-12)
    zero = torch.zeros(1, 1, 1).double()
    plain = preference_loss(zero + 2, zero, equal, 0 * one, one)
    margin = preference_loss(zero + 5, zero, equal, one, one, margin_scale=3.0)
    assert float(plain) == pytest.approx(float(margin), rel=1e-12), "a lead of 5 with a margin of 3 is a lead of 2"


def test_far_apart_scores_have_finite_losses() -> None:
    far = torch.full((1, 1, 1), 1e4)
    one, yes = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    for loss in (preference_loss(-far, far, yes, one, one, label_noise=0.1), tie_loss(far, -far, yes, one)):
        assert loss.isfinite().all()
    assert grade_loss(far, one, yes, one).isfinite().all()
