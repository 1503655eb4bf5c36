"""Combinations of options about rewards that cannot work. Each check raises for the first that it finds."""

from __future__ import annotations

from itertools import pairwise

from posttrain.config.errors import UserError
from posttrain.config.origins import Origins
from posttrain.config.reward_schema import CurriculumSection
from posttrain.config.schema import RewardStage, RunConfig

_OF_PACING = {"phases": ("phases",), "competence": ("initial_competence", "full_competence", "replay")}
"""Options that belong to one kind of pacing."""


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
