"""Which stages a command of one kind runs, and whether what they need is done."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from posttrain.config import RunConfig, UserError, stage_order
from posttrain.config.names import suggest


def stages_of_kind(config: RunConfig, kind: str, stage: str | None, file: str) -> list[str]:
    """Names of the stages of a kind in the order they run, or the one asked for.

    Raises:
        UserError: the configuration has none of the kind, or `stage` is none of them.
    """
    names = [name for name in stage_order(config) if config.stages[name].kind == kind]
    if not names:
        kinds = ", ".join(dict.fromkeys(section.kind for section in config.stages.values()))
        raise UserError(f"no stage is of kind {kind}", where=f"{file}: stages", instead=f"there are stages of kind {kinds}")
    if stage is None:
        return names
    if stage in config.stages and stage not in names:
        other = config.stages[stage].kind
        raise UserError(
            f"stage '{stage}' is of kind {other}",
            where=f"{file}: --stage",
            instead=f"write posttrain {other} {file} --stage {stage}",
        )
    if stage not in names:
        raise UserError(f"unknown stage '{stage}'", where=f"{file}: --stage", instead=suggest(stage, names))
    return [stage]


def require_done(config: RunConfig, names: Sequence[str], arguments: Sequence[str]) -> None:
    """See that everything outside these stages that they need is done and current.

    Args:
        names: stages that are about to run.
        arguments: file and overrides as given, to show the command that does the rest.

    Raises:
        UserError: the first stage that cannot start, with what it lacks and the command that makes it.
    """
    from posttrain.pipeline.plan import plan

    for name in names:
        lacking: dict[str, str] = {}
        for row in plan(config, only=name).rows:
            stage = row.node.split(".", 1)[0]
            if not row.cached and stage not in names:
                lacking.setdefault(stage, "not done" if row.reason == "new" else row.reason)
        if lacking:
            raise UserError(
                f"needs {', '.join(f'{stage!r} ({state})' for stage, state in lacking.items())}",
                where=f"{arguments[0]}: stages.{name}",
                instead=f"`posttrain run {shlex.join(arguments)} --until {name}` does these first",
            )
