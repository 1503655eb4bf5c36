"""Combinations of options about rewards that cannot work. Each check raises for the first that it finds."""

from __future__ import annotations

from itertools import pairwise

from posttrain.config.errors import UserError
from posttrain.config.origins import Origins
from posttrain.config.reward_schema import CurriculumSection
from posttrain.config.schema import RewardStage, RunConfig, SourceSection

_OF_PACING = {"phases": ("phases",), "competence": ("initial_competence", "full_competence", "replay")}
"""Options that belong to one kind of pacing."""


def check_reward_stages(config: RunConfig, at: Origins) -> None:
    """See that each reward stage has its heads once, and can go on from the reward model that it starts from, if any.

    Raises:
        UserError: a dimension that is listed twice, other heads than those of the first stage, or prompts to sample answers to.
    """
    for name, stage in config.stages.items():
        if not isinstance(stage, RewardStage):
            continue
        twice = next((target for target in stage.dimensions if stage.dimensions.count(target) > 1), None)
        if twice is not None:
            raise UserError(
                f"'{twice}' stands twice", where=at.where(f"stages.{name}.dimensions"), instead="name each dimension once"
            )
        first = config.stages.get(stage.init)
        if isinstance(first, RewardStage):
            _check_same_heads(name, stage, first, at)
            _refuse_sampling(config, name, stage, at)


def _check_same_heads(name: str, stage: RewardStage, first: RewardStage, at: Origins) -> None:
    if stage.dimensions != first.dimensions:
        listed = ", ".join(first.dimensions)
        raise UserError(
            f"'{stage.init}', which this stage starts from, has heads for {listed}",
            where=at.where(f"stages.{name}.dimensions"),
            instead=f"write dimensions: [{listed}], or start from a language model",
        )
    if stage.ensemble != first.ensemble:
        raise UserError(
            f"{stage.ensemble} is not the ensemble of '{stage.init}', which this stage starts from",
            where=at.where(f"stages.{name}.ensemble"),
            instead=f"write {first.ensemble}, or start from a language model",
        )


def _refuse_sampling(config: RunConfig, name: str, stage: RewardStage, at: Origins) -> None:
    """Sources that are known to give prompts alone; what is in a file only reading it tells."""
    for option, refs in (("data", stage.data), ("heldout", stage.heldout)):
        for ref in refs:
            if _gives_prompts(config.sources[ref.partition("/")[0]]):
                raise UserError(
                    f"'{ref}' has no pairs, and '{stage.init}' makes a reward model, which cannot write answers",
                    where=at.where(("stages", name, option, ref)),
                    instead="name a source of pairs or graded answers, or start from a language model",
                )


def _gives_prompts(source: SourceSection) -> bool:
    return source.kind == "reasoning_gym" or source.kind == "graded_pairs" and source.emit == "demonstrations"


def check_curricula(config: RunConfig, at: Origins) -> None:
    """See that the curriculum of each reward stage can be followed.

    Raises:
        UserError: phases that do not ascend from 0, weights that are all 0, or an option of the other kind of pacing.
    """
    for name, stage in config.stages.items():
        if isinstance(stage, RewardStage) and stage.curriculum is not None:
            key = ("stages", name, "curriculum")
            _refuse_meaningless(stage.curriculum, key, at)
            _check_phases(stage.curriculum, key, at)
            _check_difficulty(stage.curriculum, key, at)


def _refuse_meaningless(section: CurriculumSection, key: tuple[str, ...], at: Origins) -> None:
    """Options of the other pacing at another value than their default: a written-out config names them all."""
    default = CurriculumSection()
    for pacing, options in _OF_PACING.items():
        for option in options:
            if pacing != section.pacing and (value := getattr(section, option)) != getattr(default, option):
                shown = f" (value {value:g})" if isinstance(value, float) else ""
                raise UserError(
                    f"'{option}' means nothing for pacing {section.pacing}{shown}",
                    where=at.where((*key, option)),
                    instead=f"take it out, or write pacing: {pacing}",
                )


def _check_phases(section: CurriculumSection, key: tuple[str, ...], at: Origins) -> None:
    for name, phase in section.phases.items():
        if sum(phase.weights.values()) <= 0:
            raise UserError(
                "all weights are 0",
                where=at.where((*key, "phases", name, "weights")),
                instead="write a number above 0 for at least one bucket",
            )
    first, phase = next(iter(section.phases.items()))
    if phase.begins != 0:
        raise UserError(
            f"the first phase begins at {phase.begins:g}",
            where=at.where((*key, "phases", first, "begins")),
            instead="write 0, or put the phases in order of their beginnings",
        )
    for (earlier, before), (later, after) in pairwise(section.phases.items()):
        if after.begins <= before.begins:
            raise UserError(
                f"{after.begins:g} is not after the {before.begins:g} of the phase '{earlier}' above it",
                where=at.where((*key, "phases", later, "begins")),
                instead="write the phases in order, each beginning later than the one before",
            )


def _check_difficulty(section: CurriculumSection, key: tuple[str, ...], at: Origins) -> None:
    if not any(section.difficulty.model_dump().values()):
        raise UserError(
            "all weights are 0, so no pair is harder than another",
            where=at.where((*key, "difficulty")),
            instead="write a number above 0 for at least one component",
        )
