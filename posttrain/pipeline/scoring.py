"""Scoring files with a reward model: every answer's breakdown, means by dimension, pair accuracy, one file against another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.dimensions import TARGETS
from posttrain.config.errors import UserError
from posttrain.config.loading import load_config
from posttrain.config.names import suggest
from posttrain.config.reward_schema import RewardSection
from posttrain.config.schema import DPOStage, RLStage, SFTStage
from posttrain.data.formats import Record, prompt_key
from posttrain.pipeline.answer_files import sample_of
from posttrain.pipeline.files import write_json_lines
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.intervals import bootstrap_mean, wilson
from posttrain.pipeline.report import read_run
from posttrain.pipeline.reward_data import reward_run
from posttrain.pipeline.reward_tables import Table, number, percent
from posttrain.reward.types import LevelScore, RewardBreakdown, RewardModel

if TYPE_CHECKING:
    from posttrain.reward.learned import LearnedLevel

TOTAL = "total"
REWARD_CLASS = "ForSequenceClassification"


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer of a file with its reward.

    Attributes:
        record: the normalised record that it stands in.
        side: its field there: "completion", "chosen" or "rejected".
        breakdown: its reward.
    """

    record: Record
    side: str
    breakdown: RewardBreakdown

    @property
    def text(self) -> str:
        """The answer."""
        return str(self.record[self.side][-1]["content"])

    def to_json(self) -> dict[str, Any]:
        """A line of the output file."""
        prompt = self.record.get("prompt", [])
        return {"prompt": prompt, "side": self.side, "answer": self.text, "reward": self.breakdown.to_json()}


@dataclass(frozen=True)
class Measure:
    """One number of the hierarchy over many answers: count, mean and standard deviation (None for a single answer)."""

    count: int
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class PairMeasure:
    """How often a measure prefers the better answer, among the pairs that speak about it; ties count half."""

    count: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Wins:
    """One file's answers against another's in one measure, over the prompts that both have.

    Attributes:
        count: prompts.
        wins, ties, losses: of the first file, by the mean over a prompt's answers.
        share: of wins, ties counting half.
        low, high: 95 % interval of the share, bootstrap over prompts.
        difference: mean lead of the first file.
    """

    count: int
    wins: int
    ties: int
    losses: int
    share: float
    low: float
    high: float
    difference: float


def find_reward_model(path: Path) -> Path:
    """The folder of weights that is meant by a model's folder, by a stage's folder of a run, or by a run with one reward stage.

    Raises:
        UserError: there is no such folder, no model in it, a language model instead, or several reward models.
    """
    if not path.is_dir():
        raise UserError("no such folder", where=str(path), instead="give a reward model's folder, or OUTPUT_DIR/NAME of a run")
    folder = next((found for found in (path, path / "model") if (found / "config.json").is_file()), None)
    if folder is None:
        folder = _model_of_run(path)
    from posttrain.model.checkpoint_files import config_fields

    architectures = config_fields(folder).get("architectures") or ["a model of no known kind"]
    if not any(str(name).endswith(REWARD_CLASS) for name in architectures):
        raise UserError(
            f"holds no reward model but {architectures[0]}", where=str(folder), instead="`posttrain reward CONFIG` trains one"
        )
    return folder


def _model_of_run(path: Path) -> Path:
    folder = RunFolder(path)
    if not folder.manifest_path.is_file():
        raise UserError("holds no model (no config.json)", where=str(path), instead="`posttrain reward CONFIG` trains one")
    stages = [stage.folder for stage in reward_run(read_run(path)).stages.values()]
    found = [stage / "model" for stage in stages if (stage / "model" / "config.json").is_file()]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError("the run has no finished reward model", where=str(path), instead="`posttrain reward CONFIG` trains one")
    raise UserError(f"the run has {len(found)} reward models", where=str(path), instead=f"name one: {', '.join(map(str, found))}")


def reward_section(place: str | None) -> RewardSection:
    """The composition of "CONFIG:STAGE"; the default one for None.

    Raises:
        UserError: not of that form, a broken configuration, or a stage without a reward.
    """
    if place is None:
        return RewardSection()
    path, separator, name = place.rpartition(":")
    if not separator or not path:
        raise UserError("names no stage", where=f"--reward {place}", instead="write --reward CONFIG:STAGE")
    stages = load_config(Path(path), ()).stages
    able = {stage: section.reward for stage, section in stages.items() if isinstance(section, SFTStage | DPOStage | RLStage)}
    if name not in able:
        raise UserError(f"no stage '{name}' with a reward", where=f"--reward {place}", instead=suggest(name, able))
    return able[name]


def open_reward(folder: Path, section: RewardSection) -> RewardModel:
    """The hierarchy above a reward model's weights; UserError where the folder is damaged or a judge cannot be used."""
    from posttrain.stages.rewards import load_reward

    return load_reward(folder, section)


def open_learned(folder: Path) -> LearnedLevel:
    """The heads of a reward model's folder, on the device that there is; UserError where the folder is damaged."""
    from posttrain.data.tokenizer import load_tokenizer
    from posttrain.model.loading import load_reward_model
    from posttrain.reward.learned import LearnedLevel
    from posttrain.stages.devices import placed

    return LearnedLevel(placed(load_reward_model(folder)), load_tokenizer(folder))


def score_records(reward: RewardModel, records: Sequence[Record]) -> list[ScoredAnswer]:
    """Every answer of the records with its reward: a pair gives two, the better one first."""
    answers = [(record, side) for record in records for side in ("completion", "chosen", "rejected") if side in record]
    # A pair may be a demonstration's record too; its two answers are what is compared.
    answers = [(record, side) for record, side in answers if side != "completion" or "chosen" not in record]
    breakdowns = reward.score([sample_of(record, side) for record, side in answers])
    return [ScoredAnswer(record, side, found) for (record, side), found in zip(answers, breakdowns, strict=True)]


def write_breakdowns(path: Path, answers: Sequence[ScoredAnswer]) -> None:
    """One JSON line an answer, in order. UserError where the file cannot be written."""
    write_json_lines(path, (answer.to_json() for answer in answers))


def measures_of(breakdown: RewardBreakdown) -> dict[str, float]:
    """The numbers of a breakdown that can be compared between answers: total, top levels, dimensions and their attributes.

    Names are paths: "correctness" is the evidence, "rest/correctness" the dimension within the rest. "No verdict" is left out.
    """
    found = {TOTAL: breakdown.total}

    def walk(node: LevelScore, path: str) -> None:
        if node.score is not None:
            found[path] = node.score
        for part in node.parts:
            below(part, path)

    def below(node: LevelScore, path: str) -> None:
        if node.name in TARGETS:
            walk(node, f"{path}/{node.name}")
        else:  # who gave the evidence: it has no name of its own in the path
            for part in node.parts:
                below(part, path)

    for level in breakdown.levels:
        walk(level, level.name)
    return found


def summarise(answers: Sequence[ScoredAnswer]) -> dict[str, Measure]:
    """Mean and standard deviation of every measure, in the order of the tree."""
    columns = _columns([measures_of(answer.breakdown) for answer in answers])
    return {
        name: Measure(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
        for name, values in columns.items()
    }


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name] for row in rows if name in row] for name in names}


def pair_accuracies(answers: Sequence[ScoredAnswer]) -> dict[str, PairMeasure]:
    """Accuracy of every measure on pairs; a dimension counts the pairs whose margins say that they differ in it, where given.

    Args:
        answers: of `score_records` on pairs: better and worse in turn.
    """
    found: dict[str, list[float]] = {}
    for better, worse in zip(answers[::2], answers[1::2], strict=True):
        one, other = measures_of(better.breakdown), measures_of(worse.breakdown)
        margins = better.record.get("margins")
        for name in one.keys() & other.keys():
            target = name.rpartition("/")[2]
            if margins is None or target not in TARGETS or margins.get(target):
                lead = one[name] - other[name]
                found.setdefault(name, []).append((lead > 0) + 0.5 * (lead == 0))
    order = measures_of(answers[0].breakdown)
    names = [name for name in order if name in found] + [name for name in found if name not in order]
    return {
        name: PairMeasure(len(found[name]), share, *wilson(share, len(found[name])))
        for name in names
        for share in [_mean(found[name])]
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def compare(first: Sequence[ScoredAnswer], second: Sequence[ScoredAnswer], seed: int = 0) -> dict[str, Wins]:
    """The first file's answers against the second's, by measure, over the prompts that both answer.

    Raises:
        UserError: they share no prompt.
    """
    shared_prompts([answer.record for answer in first], [answer.record for answer in second])
    one, other = _by_prompt(first), _by_prompt(second)
    shared = [key for key in one if key in other]
    names = dict.fromkeys(name for key in shared for name in one[key] if name in other[key])
    return {
        name: _wins([one[key][name] - other[key][name] for key in shared if name in one[key] and name in other[key]], seed)
        for name in names
    }


def shared_prompts(first: Sequence[Record], second: Sequence[Record]) -> tuple[int, int]:
    """Prompts that both files answer, and prompts that only one of them does.

    Raises:
        UserError: they share no prompt.
    """
    one, other = ({prompt_key(record) for record in records} for records in (first, second))
    if not one & other:
        raise UserError("the two files have no prompt in common", instead="--compare wants answers to the same prompts")
    return len(one & other), len(one ^ other)


def _by_prompt(answers: Sequence[ScoredAnswer]) -> dict[str, dict[str, float]]:
    """Measures of each prompt, their means where it has several answers."""
    rows: dict[str, list[dict[str, float]]] = {}
    for answer in answers:
        rows.setdefault(prompt_key(answer.record), []).append(measures_of(answer.breakdown))
    return {key: {name: _mean(values) for name, values in _columns(found).items()} for key, found in rows.items()}


def _wins(leads: Sequence[float], seed: int) -> Wins:
    wins, losses = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    points = [(lead > 0) + 0.5 * (lead == 0) for lead in leads]
    low, high = bootstrap_mean(points, seed)
    return Wins(len(leads), wins, len(leads) - wins - losses, losses, _mean(points), low, high, _mean(leads))


def measure_table(measures: Mapping[str, Measure], title: str = "Scores") -> Table:
    """`summarise` as a table."""
    rows = tuple((name, str(found.count), number(found.mean), number(found.deviation)) for name, found in measures.items())
    return Table(title, ("measure", "answers", "mean", "sd"), rows)


def pair_table(accuracies: Mapping[str, PairMeasure]) -> Table:
    """`pair_accuracies` as a table."""
    rows = tuple(
        (name, str(found.count), percent(found.accuracy), f"{percent(found.low)} to {percent(found.high)}")
        for name, found in accuracies.items()
    )
    return Table("Pair accuracy", ("measure", "pairs", "accuracy", "95 % interval"), rows)


def wins_table(wins: Mapping[str, Wins], unshared: int) -> Table:
    """`compare` as a table; `unshared` prompts stand in one file alone and were left out."""
    rows = tuple(
        (
            name,
            str(found.count),
            f"{found.wins} / {found.ties} / {found.losses}",
            percent(found.share),
            f"{percent(found.low)} to {percent(found.high)}",
            number(found.difference),
        )
        for name, found in wins.items()
    )
    columns = ("measure", "prompts", "wins / ties / losses", "share won", "95 % interval", "mean lead")
    several = "prompt stands in one file alone and is" if unshared == 1 else "prompts stand in one file alone and are"
    note = f"{unshared} {several} left out." if unshared else ""
    return Table("First file against second", columns, rows, note)


def as_json(found: Mapping[str, Measure | PairMeasure | Wins]) -> dict[str, dict[str, Any]]:
    """Numbers by measure, as JSON values."""
    return {name: asdict(value) for name, value in found.items()}
