"""Losses of a reward model with several heads: pure functions of scores and labels.

Scores are [items, targets, members]. Every function gives one number an item, the mean over the targets that the item names
and over the members; so an item weighs as one item however many targets it names. A target that it does not name gets no
gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def preference_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    differs: torch.Tensor,
    margins: torch.Tensor,
    weights: torch.Tensor,
    *,
    margin_scale: float = 0.0,
    label_noise: float = 0.0,
) -> torch.Tensor:
    """Bradley-Terry with the margin of Llama 2 (2307.09288, section 3.2.2), and labels that are wrong at a known rate.

    With d the lead of the better answer, z = d - margin_scale * margin: -(1 - noise) log sigmoid(z) - noise log sigmoid(-z).

    Args:
        chosen, rejected: scores of the better and the worse answer, [pairs, targets, members].
        differs: bool [pairs, targets]; where the pair has a better answer.
        margins: [pairs, targets], in [0, 1]; 0 where unknown.
        weights: of each pair for each member, [pairs, members].
        margin_scale: what a margin of 1 asks for.
        label_noise: share of labels that are taken to be the wrong way round, below 0.5.

    Returns:
        [pairs].
    """
    lead = chosen - rejected - margin_scale * margins[..., None]
    loss = -F.logsigmoid(lead)
    if label_noise:
        loss = (1 - label_noise) * loss - label_noise * F.logsigmoid(-lead)
    return _by_item(loss, differs, weights)


def tie_loss(chosen: torch.Tensor, rejected: torch.Tensor, equal: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """-(log sigmoid(d) + log sigmoid(-d)) / 2: Bradley-Terry where either answer is preferred as often; least at d = 0.

    Args:
        chosen, rejected, weights: as `preference_loss`.
        equal: bool [pairs, targets]; where the answers of the pair are equally good.

    Returns:
        [pairs].
    """
    lead = chosen - rejected
    return _by_item(-(F.logsigmoid(lead) + F.logsigmoid(-lead)) / 2, equal, weights)


def centring_loss(chosen: torch.Tensor, rejected: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
    """(chosen + rejected)^2, which only pulls scores to zero where they are free to move (2312.09244, as in TRL).

    Args:
        chosen, rejected: as `preference_loss`.
        named: bool [pairs, targets]; targets that the pair says something about.

    Returns:
        [pairs].
    """
    return _by_item((chosen + rejected) ** 2, named, chosen.new_ones(chosen.shape[0], chosen.shape[2]))


def grade_loss(scores: torch.Tensor, grades: torch.Tensor, graded: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of sigmoid(score) with the grade, so that a score is the log-odds of a full mark.

    Args:
        scores: [answers, targets, members].
        grades: [answers, targets], in [0, 1]; any finite number where not graded.
        graded: bool [answers, targets].
        weights: of each answer for each member, [answers, members].

    Returns:
        [answers].
    """
    wanted = grades[..., None].expand_as(scores)
    return _by_item(F.binary_cross_entropy_with_logits(scores, wanted, reduction="none"), graded, weights)


def _by_item(values: torch.Tensor, named: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[items, targets, members] -> [items]: weighted mean over members, then mean over named targets, 0 where none is named."""
    by_target = (values * weights[:, None, :]).mean(dim=2) * named
    return by_target.sum(dim=1) / named.sum(dim=1).clamp(min=1)
