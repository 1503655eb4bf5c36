"""The typer application and the way errors reach a person."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from posttrain import __version__
from posttrain.cli import tables
from posttrain.cli.bench import bench_app
from posttrain.cli.convert import convert_command
from posttrain.cli.reward import reward_command
from posttrain.cli.score import score_command
from posttrain.cli.serving import generate_command, serve_command
from posttrain.config import RunConfig, UserError, explain, load_config
from posttrain.config.names import suggest
from posttrain.config.tree import options

app = typer.Typer(
    help="Post-training for MiniMax-Text-01 and its family: reward models, SFT, preference learning and online RL.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Options to change, such as stages.sft_short.steps=20.", show_default=False),
]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage and its evaluation.")]
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Do this stage again, and what depends on it.")]
StageName = Annotated[str | None, typer.Option("--stage", metavar="NAME", help="This stage alone.")]

_INTERRUPTED = "error: interrupted; what is complete is kept, and the same command goes on from there"
_FAULTS_OF_THE_MACHINE = {
    errno.ENOSPC: "free some space; the same command goes on from the last complete checkpoint",
    errno.EDQUOT: "free some of your quota; the same command goes on from the last complete checkpoint",
    errno.EROFS: "choose another output_dir",
    errno.EACCES: "change the permissions, or choose another output_dir",
}


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full trace of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Post-training for MiniMax-Text-01 and its family."""
    if version:
        typer.echo(f"posttrain {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("plan")
def plan_command(config: ConfigPath, overrides: Overrides = None, until: Until = None, from_stage: From = None) -> None:
    """Check a configuration and show what `run` would do."""
    loaded = _load(config, overrides, until, from_stage)
    from posttrain.pipeline.plan import plan

    tables.print_plan(plan(loaded, until=until, from_stage=from_stage))


@app.command("run")
def run_command(config: ConfigPath, overrides: Overrides = None, until: Until = None, from_stage: From = None) -> None:
    """Run the stages that are not done yet."""
    loaded = _load(config, overrides, until, from_stage)
    from posttrain.pipeline.run import run as execute

    folder = execute(loaded, until=until, from_stage=from_stage, console=tables.console())
    typer.echo(f"done; see `posttrain report {tables.short(folder.path)}`")


app.command("reward")(reward_command)
app.command("score")(score_command)


@app.command("sft")
def sft_command(config: ConfigPath, overrides: Overrides = None, stage: StageName = None) -> None:
    """Run the supervised fine-tuning stages; what they start from must be done."""
    _run_kind("sft", config, overrides, stage)


@app.command("dpo")
def dpo_command(config: ConfigPath, overrides: Overrides = None, stage: StageName = None) -> None:
    """Run the preference-learning stages; what they start from must be done."""
    _run_kind("dpo", config, overrides, stage)


@app.command("rl")
def rl_command(config: ConfigPath, overrides: Overrides = None, stage: StageName = None) -> None:
    """Run the online RL stages; what they start from must be done."""
    _run_kind("rl", config, overrides, stage)


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: OUTPUT_DIR/NAME.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON, and nothing else.")] = False,
) -> None:
    """Print a run's table and write its report.html."""
    from posttrain.pipeline.report import table, table_json, write_html

    rows = table(run)
    if as_json:
        typer.echo(table_json(rows))
        return
    tables.print_report(rows)
    typer.echo(f"report: {tables.short(write_html(run))}")


@app.command("explain")
def explain_command(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Full name or its end; without it, all.")] = None,
) -> None:
    """Say what an option means, what may be written, its default and where that comes from."""
    typer.echo(explain(key) if key is not None else "\n".join(dict.fromkeys(option.key for option in options())))


app.command("convert")(convert_command)
app.add_typer(bench_app, name="bench")
app.command("generate")(generate_command)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve_command)


@app.command("doctor")
def doctor_command() -> None:
    """Say what this machine can run, and what is missing."""
    from posttrain.cli.doctor import examine

    findings = examine()
    tables.print_findings(findings)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def _load(path: Path, overrides: list[str] | None, until: str | None = None, from_stage: str | None = None) -> RunConfig:
    """The checked configuration, and the stages that options name looked up in it."""
    config = load_config(path, overrides or ())
    for option, name in (("--until", until), ("--from", from_stage)):
        known = ["base", *config.stages]
        if name is not None and name not in known:
            raise UserError(f"unknown stage '{name}'", where=f"{path}: {option}", instead=suggest(name, known))
    return config


def _run_kind(kind: str, path: Path, overrides: list[str] | None, stage: str | None) -> None:
    """Run the stages of one kind (or one of them), once everything else that they need is done."""
    from posttrain.cli.selection import require_done, stages_of_kind

    config = load_config(path, overrides or ())
    names = stages_of_kind(config, kind, stage, str(path))
    require_done(config, names, [str(path), *(overrides or ())])
    from posttrain.pipeline.run import run as execute

    for name in names:
        folder = execute(config, only=name, console=tables.console())
    typer.echo(f"done: {', '.join(names)}; see `posttrain report {tables.short(folder.path)}`")


def run(arguments: Sequence[str]) -> int:
    """Run a command line.

    Args:
        arguments: words after the program's name.

    Returns:
        Exit status: 0; 1 for something missing that `doctor` found; 2 for a mistake of the user or a fault of the machine,
        told in one line on stderr; 130 after Ctrl-C.

    Raises:
        Exception: with --debug every error, else programming errors alone.
    """
    words = list(arguments)
    debug = "--debug" in words
    if debug:  # understood at any place; typer knows it only before the command
        words = ["--debug", *(word for word in words if word != "--debug")]
    try:
        status = app(words, prog_name="posttrain", standalone_mode=False)
    except KeyboardInterrupt:
        status = 130
    except (UserError, typer.Abort, typer.TyperException, OSError) as error:
        line = _line(error)
        if debug or line is None:
            raise
        print(line, file=sys.stderr)
        return 130 if isinstance(error.__cause__, KeyboardInterrupt) else 2
    if status == 130:
        print(_INTERRUPTED, file=sys.stderr)
    return status if isinstance(status, int) else 0


def _line(error: Exception) -> str | None:
    """What to print for an error, or None where it is not for the user to mend."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "posttrain"
        return f"error: {' '.join(error.format_message().split()).rstrip('.')}; see `{command} --help`"
    if isinstance(error, OSError) and error.errno in _FAULTS_OF_THE_MACHINE:
        where = str(error.filename) if error.filename else None
        return f"error: {UserError(str(error.strerror).lower(), where=where, instead=_FAULTS_OF_THE_MACHINE[error.errno])}"
    return "error: aborted" if isinstance(error, typer.Abort) else None
