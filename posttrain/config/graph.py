"""The stages as a graph: who needs whom, and an order to run them in."""

from __future__ import annotations

from posttrain.config.errors import UserError
from posttrain.config.schema import DPOStage, RLStage, RunConfig, SFTStage

BASE = "base"
"""Name of the first model, which no stage makes."""


def stage_dependencies(config: RunConfig, name: str) -> dict[str, str]:
    """What a stage needs: role -> stage.

    Roles are "init" (a stage or "base"), "reward" (the stage of `reward.model`) and "timer" (the stage of `match_time_of`);
    a role that the stage does not use is left out.
    """
    stage = config.stages[name]
    needs = {"init": stage.init}
    if isinstance(stage, SFTStage | DPOStage | RLStage) and stage.reward.model is not None:
        needs["reward"] = stage.reward.model
    if isinstance(stage, SFTStage) and stage.match_time_of is not None:
        needs["timer"] = stage.match_time_of
    return needs


def stage_order(config: RunConfig) -> list[str]:
    """All stages, each after those it needs; among stages that could come next, the one written first.

    Raises:
        UserError: stages that need each other, with the cycle, or an unknown stage.
    """
    needs = {name: [stage for stage in stage_dependencies(config, name).values() if stage != BASE] for name in config.stages}
    order: list[str] = []
    while len(order) < len(needs):
        ready = (name for name in needs if name not in order and all(stage in order for stage in needs[name]))
        following = next(ready, None)
        if following is None:
            _refuse({name: [stage for stage in needs[name] if stage not in order] for name in needs if name not in order})
        else:
            order.append(following)
    return order


def _refuse(needs: dict[str, list[str]]) -> None:
    """Raise for stages that can never start: walking from any of them along what it waits for ends in a circle."""
    path = [next(iter(needs))]
    while True:
        waits_for = next((stage for stage in needs[path[-1]] if stage in needs), None)
        if waits_for is None:
            raise UserError(f"needs the unknown stage '{needs[path[-1]][0]}'", where=f"stages.{path[-1]}")
        if waits_for in path:
            break
        path.append(waits_for)
    cycle = [*path[path.index(waits_for) :], waits_for]
    raise UserError(
        f"stages wait for each other: {' -> '.join(cycle)}", where=f"stages.{cycle[0]}", instead=f"give one of them init: {BASE}"
    )
