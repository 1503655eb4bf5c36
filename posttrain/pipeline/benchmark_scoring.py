"""A reward model's accuracy on a file in a public benchmark's schema; the rules are in `posttrain.reward.benchmarks`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from posttrain.config.dimensions import DIMENSIONS
from posttrain.config.errors import UserError
from posttrain.pipeline.answer_files import read_rows
from posttrain.pipeline.reward_tables import Table, percent
from posttrain.pipeline.scoring import open_learned, open_reward, reward_section
from posttrain.reward.benchmarks import Benchmark, BenchmarkResult, evaluate
from posttrain.reward.types import Sample

if TYPE_CHECKING:
    from posttrain.reward.heads import HeadScore


def score_benchmark(folder: Path, file: Path, benchmark: Benchmark, place: str | None) -> BenchmarkResult:
    """Score a benchmark's file.

    Args:
        folder: the reward model.
        file: rows in the benchmark's schema, JSON lines or Parquet.
        benchmark: whose schema and rules.
        place: "CONFIG:STAGE" whose composition gives the score. None takes the plain mean of the logits of the model's dimensions
            (of all its heads where it has none), on which margins mean what they mean in the benchmark.

    Raises:
        UserError: an unreadable file, rows in another schema, or what `reward_section` and `open_reward` raise.
    """
    rows = read_rows(file)
    score = _scorer(folder, place)  # opened out here: what is wrong with the model is not the file's fault
    try:
        return evaluate(rows, score, benchmark)
    except UserError as error:
        raise UserError(error.what, where=": ".join(filter(None, (str(file), error.where))), instead=error.instead) from None


def _scorer(folder: Path, place: str | None) -> Callable[[list[Sample]], list[float]]:
    """What gives answers the numbers that `score_benchmark` compares."""
    if place is not None:
        reward = open_reward(folder, reward_section(place))
        return lambda samples: [found.total for found in reward.score(samples)]
    learned = open_learned(folder)
    return lambda samples: [mean_logit(found) for found in learned.dimension_scores(samples)]


def mean_logit(scores: dict[str, HeadScore]) -> float:
    """Mean over the heads of dimensions; over all heads where there are only attributes."""
    dimensions = [found.mean for target, found in scores.items() if target in DIMENSIONS]
    return fmean(dimensions or [found.mean for found in scores.values()])


def benchmark_table(result: BenchmarkResult) -> Table:
    """Accuracy of every subset, with what it is made of, and the overall score."""
    rows = [
        (
            name,
            str(subset.count),
            percent(subset.accuracy),
            ", ".join(f"{term} {percent(value)}" for term, value in subset.terms.items()),
        )
        for name, subset in result.subsets.items()
    ]
    rows.append(("overall", str(sum(subset.count for subset in result.subsets.values())), percent(result.score), ""))
    return Table(result.benchmark, ("subset", "prompts", "accuracy", "made of"), tuple(rows))
