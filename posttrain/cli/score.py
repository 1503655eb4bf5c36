"""`posttrain score`: a file of answers, pairs, benchmark rows or documents, scored and explained."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from posttrain.cli import tables
from posttrain.config import UserError

if TYPE_CHECKING:
    from posttrain.pipeline.scoring import ScoredAnswer
    from posttrain.reward.benchmarks import Benchmark


class FileFormat(StrEnum):
    """What a file's columns are."""

    trl = "trl"
    rewardbench2 = "rewardbench2"
    rm_bench = "rm_bench"

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark of that name; ValueError for TRL's columns."""
        if self is FileFormat.trl:
            raise ValueError("TRL's columns are no benchmark's")
        return "rewardbench2" if self is FileFormat.rewardbench2 else "rm_bench"


class Way(StrEnum):
    """What a file is scored as."""

    answers = "answers"
    benchmark = "benchmark"
    documents = "documents"


class _Use(NamedTuple):
    """Where a part of the command line means something: in which ways of scoring, and beside which option."""

    ways: tuple[Way, ...]
    beside: str | None = None
    instead: str = "leave it out"


_UNUSED = {
    Way.answers: "without --documents",
    Way.benchmark: "for a benchmark's format",
    Way.documents: "beside --documents",
}
_JUDGES_OF_ANSWERS = "leave it out; judges of answers stand in a config: --reward"
_USES = {
    "FILE": _Use((Way.answers, Way.benchmark)),
    "--compare": _Use((Way.answers,)),
    "--output": _Use((Way.answers, Way.documents)),
    "--format": _Use((Way.answers, Way.benchmark)),
    "--reward": _Use((Way.answers, Way.benchmark)),
    "--trees": _Use((Way.answers,)),
    "--seed": _Use((Way.answers,), beside="--compare"),
    "--judge": _Use((Way.documents,), instead=_JUDGES_OF_ANSWERS),
    "--judge-model": _Use((Way.documents,), "--judge", _JUDGES_OF_ANSWERS),
    "--judge-key": _Use((Way.documents,), "--judge", _JUDGES_OF_ANSWERS),
    "--floor": _Use((Way.documents,)),
}

Model = Annotated[
    Path | None,
    typer.Argument(metavar="MODEL", help="Reward model: its folder, a stage's folder, or a run.", show_default=False),
]
File = Annotated[
    Path | None,
    typer.Argument(
        metavar="FILE", help="JSON lines or Parquet: prompt and completion, or chosen and rejected.", show_default=False
    ),
]


def score_command(
    context: typer.Context,
    model: Model = None,
    file: File = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="FILE2", help="Other answers to the same prompts: who wins, by dimension.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="OUT", help="Write every breakdown (or grade) there, a JSON line each.")
    ] = None,
    format: Annotated[
        FileFormat, typer.Option("--format", help="What the columns are: TRL's, or a benchmark's.")
    ] = FileFormat.trl,
    reward: Annotated[
        str | None,
        typer.Option("--reward", metavar="CONFIG:STAGE", help="Compose as this stage does: its weights, gates and judges."),
    ] = None,
    trees: Annotated[int, typer.Option("--trees", min=0, help="Answers whose breakdown is printed.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="--compare: of the bootstrap.")] = 0,
    documents: Annotated[
        Path | None,
        typer.Option("--documents", metavar="FILE", help="Grade plain documents (column text), and weigh their sources."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", metavar="URL", help="--documents: an OpenAI-compatible endpoint.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model", metavar="NAME", help="--judge: the model there.")] = None,
    judge_key: Annotated[
        str | None, typer.Option("--judge-key", metavar="VARIABLE", help="--judge: environment variable that holds the key.")
    ] = None,
    floor: Annotated[
        float, typer.Option("--floor", help="--documents: least share of a low grade's weight, above 0: nothing is dropped.")
    ] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and nothing else.")] = False,
) -> None:
    """Score a file with a reward model, compare two files, or grade plain documents."""
    way = Way.documents if documents is not None else Way.answers if format is FileFormat.trl else Way.benchmark
    _refuse_idle(context, way)
    if output is not None:
        from posttrain.pipeline.files import check_output

        check_output(output)
    if documents is not None:
        _score_documents(documents, model, judge, judge_model, judge_key, floor, output, as_json)
    elif model is None or file is None:
        raise UserError("a reward model and a file are needed", instead="write posttrain score MODEL FILE, or --documents FILE")
    elif way is Way.benchmark:
        _score_benchmark(model, file, format, reward, as_json)
    else:
        _score_answers(model, file, compare, output, reward, trees, seed, as_json)


def _refuse_idle(context: typer.Context, way: Way) -> None:
    """UserError for what was given on the command line and would do nothing."""
    given = {label for label in _USES if getattr(context.get_parameter_source(_parameter(label)), "name", None) == "COMMANDLINE"}
    for label, use in _USES.items():
        if label not in given:
            continue
        if way not in use.ways:
            raise UserError(f"means nothing {_UNUSED[way]}", where=label, instead=use.instead)
        if use.beside is not None and use.beside not in given:
            raise UserError(f"means nothing without {use.beside}", where=label, instead=f"add {use.beside}, or leave it out")


def _parameter(label: str) -> str:
    """The name that a part of the command line has in Python."""
    return label.lstrip("-").replace("-", "_").lower()


def _score_answers(
    model: Path, file: Path, compare: Path | None, output: Path | None, reward: str | None, trees: int, seed: int, as_json: bool
) -> None:
    from posttrain.pipeline import scoring
    from posttrain.pipeline.answer_files import is_pair_file, read_answers

    records = read_answers(file)
    others = None if compare is None else read_answers(compare)
    shared = apart = 0
    if others is not None:
        if is_pair_file(records) or is_pair_file(others):
            raise UserError("pairs cannot be compared", where="--compare", instead="give files with prompt and completion")
        shared, apart = scoring.shared_prompts(records, others)
    scorer = scoring.open_reward(scoring.find_reward_model(model), scoring.reward_section(reward))
    answers = scoring.score_records(scorer, records)
    numbers: dict[str, Any] = {"answers": len(answers), "scores": scoring.as_json(measures := scoring.summarise(answers))}
    shown = [scoring.measure_table(measures)]
    if is_pair_file(records):
        accuracies = scoring.pair_accuracies(answers)
        numbers["pairs"] = scoring.as_json(accuracies)
        shown.append(scoring.pair_table(accuracies))
    if others is not None:
        rivals = scoring.score_records(scorer, others)
        wins = scoring.compare(answers, rivals, seed)
        numbers |= {"compare": scoring.as_json(wins), "shared_prompts": shared, "unshared_prompts": apart}
        shown += [scoring.measure_table(scoring.summarise(rivals), f"Scores of {compare}"), scoring.wins_table(wins, apart)]
    if output is not None:
        scoring.write_breakdowns(output, answers)
    if as_json:
        typer.echo(json.dumps(numbers, indent=2))
        return
    for table in shown:
        tables.print_table(table)
    for answer in answers[:trees]:
        typer.echo(_tree(answer))
    if output is not None:
        typer.echo(f"\nbreakdowns: {tables.short(output)}")


def _tree(answer: ScoredAnswer) -> str:
    """An answer with its breakdown."""
    from posttrain.pipeline.reward_tables import shorten

    prompt = answer.record.get("prompt", [])
    asked = f"{shorten(prompt[-1]['content'])} -> " if prompt else ""
    return f"\n{asked}{shorten(answer.text)}\n{answer.breakdown.explain()}"


def _score_benchmark(model: Path, file: Path, format: FileFormat, reward: str | None, as_json: bool) -> None:
    from posttrain.pipeline.benchmark_scoring import benchmark_table, score_benchmark
    from posttrain.pipeline.scoring import find_reward_model

    result = score_benchmark(find_reward_model(model), file, format.benchmark, reward)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
    else:
        tables.print_table(benchmark_table(result))


def _score_documents(
    file: Path,
    model: Path | None,
    judge: str | None,
    judge_model: str | None,
    judge_key: str | None,
    floor: float,
    output: Path | None,
    as_json: bool,
) -> None:
    from posttrain.pipeline import document_scoring as grading
    from posttrain.pipeline.answer_files import read_documents
    from posttrain.pipeline.scoring import find_reward_model
    from posttrain.reward.documents import source_weights

    if not 0 < floor <= 1:
        raise UserError(
            f"must be above 0 and at most 1, got {floor}", where="--floor", instead="low grades are thinned, never dropped"
        )
    if (judge is None) == (model is None):
        raise UserError(
            "one grader is needed", where="--documents", instead="give a reward model, or --judge URL --judge-model NAME"
        )
    if judge is not None and judge_model is None:
        raise UserError("names no model", where="--judge", instead="add --judge-model NAME")
    found = read_documents(file)
    costs: dict[str, Any] = {}
    if judge is not None and judge_model is not None:
        judging = grading.judge_grader(judge, judge_model, judge_key)
        grades = judging.grade(found)
        costs = {"costs": judging.costs.to_json()}
    else:
        assert model is not None
        grades = grading.learned_grader(find_reward_model(model)).grade(found)
    weights = source_weights(grades, floor)
    if output is not None:
        grading.write_grades(output, found, grades, floor)
    if as_json:
        typer.echo(json.dumps({"documents": len(grades), "weights": [group.to_json() for group in weights], **costs}, indent=2))
        return
    tables.print_table(grading.grades_table(grades))
    tables.print_table(grading.weights_table(weights))
    if costs:
        typer.echo("\n" + ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in costs["costs"].items()))
    if output is not None:
        typer.echo(f"\ngrades: {tables.short(output)}")
