"""Rewards of stages that cannot be composed, found before anything starts."""

from __future__ import annotations

from posttrain.config.dimensions import ATTRIBUTES
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
        named = config.stages[stage.reward.model] if stage.reward.model is not None else None
        model = named if isinstance(named, RewardStage) else None
        _check_weights(stage.reward, key, at)
        _check_judges(stage.reward, key, at)
        _check_harmlessness(stage.reward, model, key, at)
        _check_weighed(stage.reward, model, key, at)
        _check_pessimism(stage.reward, model, key, at)


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


def _check_judges(section: RewardSection, key: tuple[str, ...], at: Origins) -> None:
    for name, judge in section.judges.items():
        if judge.kind == "consistency" and judge.constitution is not None:
            raise UserError(
                f"'constitution' means nothing for a judge of kind consistency (value {judge.constitution!r})",
                where=at.where((*key, "judges", name, "constitution")),
                instead="take it out, or write kind: constitution",
            )


def _check_harmlessness(section: RewardSection, model: RewardStage | None, key: tuple[str, ...], at: Origins) -> None:
    # A judge of consistency has nothing to say about a record without a reference.
    judged = any(judge.dimension == "harmlessness" and judge.kind == "constitution" for judge in section.judges.values())
    learned = model is not None and "harmlessness" in model.dimensions
    if "harmlessness" in section.gates and not (judged or learned):
        raise UserError(
            "the gate has nothing to go by",
            where=at.where((*key, "gates", "harmlessness")),
            instead="add a constitution judge of harmlessness, or a reward model with harmlessness among its dimensions",
        )


def _check_weighed(section: RewardSection, model: RewardStage | None, key: tuple[str, ...], at: Origins) -> None:
    """Heads that neither weights nor a gate ask."""
    if model is None:
        return
    spoken = {"helpfulness" if target in ATTRIBUTES else target for target in model.dimensions}
    weighed = {name for weights in (section.weights, *section.domains.values()) for name, weight in weights.items() if weight}
    if not spoken & (weighed | (set(section.gates) & {"harmlessness"})):
        raise UserError(
            f"'{section.model}' has heads for {', '.join(model.dimensions)} alone, and all weigh 0",
            where=at.where((*key, "weights")),
            instead="weigh one of them, or write model: null",
        )


def _check_pessimism(section: RewardSection, model: RewardStage | None, key: tuple[str, ...], at: Origins) -> None:
    if section.pessimism and (model is None or model.ensemble == 1):
        raise UserError(
            f"'pessimism' means nothing without an ensemble (value {section.pessimism:g})",
            where=at.where((*key, "pessimism")),
            instead="write 0, or give the reward stage an ensemble of several members",
        )
