"""Rewards of stages that cannot be composed, found before anything starts."""

from __future__ import annotations

from posttrain.config.errors import UserError
from posttrain.config.origins import Origins
from posttrain.config.reward_schema import Dimension, RewardSection
from posttrain.config.schema import DPOStage, RewardStage, RLStage, RunConfig, SFTStage


def check_compositions(config: RunConfig, at: Origins) -> None:
    """See that the `reward` section of every stage can score answers as it says.

    Raises:
        UserError: the first option that means nothing, or that has nothing to go by.
    """
    for name, stage in config.stages.items():
        if not isinstance(stage, SFTStage | DPOStage | RLStage):
            continue
        key = ("stages", name, "reward")
        if isinstance(stage, SFTStage) and stage.sampling is None and stage.reward != RewardSection():
            raise UserError(
                "a reward means nothing without sampling, as there is nothing to score",
                where=at.where(key),
                instead="take it out, or add a sampling section",
            )
        model = config.stages[stage.reward.model] if stage.reward.model is not None else None
        _check_weights(stage.reward, key, at)
        _check_harmlessness(stage.reward, model if isinstance(model, RewardStage) else None, key, at)
        _check_pessimism(stage.reward, model if isinstance(model, RewardStage) else None, key, at)


def _check_weights(section: RewardSection, key: tuple[str, ...], at: Origins) -> None:
    """Weights that leave nothing, in general or of a domain."""
    named: list[tuple[tuple[str, ...], dict[Dimension, float]]] = [(("weights",), section.weights)]
    named += [(("domains", domain), weights) for domain, weights in section.domains.items()]
    for below, weights in named:
        if sum(weights.values()) <= 0:
            raise UserError(
                "no dimension has a weight above 0",
                where=at.where((*key, *below)),
                instead="weigh at least one; learned_weight: 0 leaves out all but evidence of correctness",
            )


def _check_harmlessness(section: RewardSection, model: RewardStage | None, key: tuple[str, ...], at: Origins) -> None:
    judged = any(judge.dimension == "harmlessness" for judge in section.judges.values())
    learned = model is not None and "harmlessness" in model.dimensions
    if "harmlessness" in section.gates and not (judged or learned):
        raise UserError(
            "the gate has nothing to go by",
            where=at.where((*key, "gates", "harmlessness")),
            instead="add a judge of harmlessness, or a reward model with harmlessness among its dimensions",
        )


def _check_pessimism(section: RewardSection, model: RewardStage | None, key: tuple[str, ...], at: Origins) -> None:
    if section.pessimism and (model is None or model.ensemble == 1):
        raise UserError(
            f"'pessimism' means nothing without an ensemble (value {section.pessimism:g})",
            where=at.where((*key, "pessimism")),
            instead="write 0, or give the reward stage an ensemble of several members",
        )
