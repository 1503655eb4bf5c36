"""The schemas of two benchmarks of reward models: checked items, and the pairs within them.

`posttrain.reward.benchmarks` scores them as they are published. As a source of pairs they are for held-out data: a model trained
on a benchmark is not measured by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import Target
from posttrain.data.formats import Message, Record
from posttrain.data.preferences.columns import Row, number_of, pair, prompt_of, text_of, texts_of
from posttrain.data.preferences.pairs import UNKNOWN_MARGIN

TIES = "Ties"
STYLES = ("concise", "detailed", "markdown")
"""RM-Bench's styles, in the order of its lists: from plain to fancy."""

_REWARDBENCH2: dict[str, Target] = {
    "Factuality": "truthfulness",
    "Precise IF": "helpfulness",
    "Math": "correctness",
    "Safety": "harmlessness",
    "Focus": "relevance",
    "Ties": "correctness",
}
_RM_BENCH: dict[str, Target] = {
    "chat": "truthfulness",
    "code": "correctness",
    "math": "correctness",
    "safety-refuse": "harmlessness",
    "safety-response": "helpfulness",
}


@dataclass(frozen=True)
class BenchmarkItem:
    """A prompt of a benchmark.

    Attributes:
        id: as in the file.
        subset: RewardBench 2's subset, RM-Bench's domain.
        prompt: messages.
        chosen, rejected: answers that are right, and that are not.
    """

    id: str
    subset: str
    prompt: list[Message]
    chosen: list[str]
    rejected: list[str]


def rewardbench2_item(row: Row, where: str | None = None) -> BenchmarkItem:
    """RewardBench 2 (allenai/reward-bench-2).

    Columns: `id` ("ref:N" and "tied:N" in the subset Ties), `prompt` (text), `chosen`, `rejected` (lists of texts; one and three
    outside of Ties), `num_correct` (length of `chosen`), `subset` (Factuality, Precise IF, Math, Safety, Focus, Ties).

    Raises:
        UserError: a column is missing or of another type, or the numbers do not agree.
    """
    schema = "rewardbench2"
    chosen, rejected = texts_of(row, "chosen", schema, where), texts_of(row, "rejected", schema, where)
    subset = text_of(row, "subset", schema, where)
    stated = number_of(row, "num_correct", schema, where, 1, len(chosen) + len(rejected))
    if stated != len(chosen):
        raise UserError(f"'num_correct' is {stated:g}, 'chosen' has {len(chosen)} answers", where=where)
    if subset != TIES and len(chosen) != 1:
        raise UserError(f"{len(chosen)} chosen answers", where=where, instead=f"only the subset {TIES} has more than one")
    return BenchmarkItem(_id(row, schema, where), subset, prompt_of(row, "prompt", schema, where), chosen, rejected)


def rm_bench_item(row: Row, where: str | None = None) -> BenchmarkItem:
    """RM-Bench (THU-KEG/RM-Bench).

    Columns: `id`, `prompt` (text), `chosen`, `rejected` (three texts each: concise, detailed, detailed in markdown), `domain`
    (chat, code, math, safety-refuse, safety-response).

    Raises:
        UserError: a column is missing or of another type.
    """
    schema = "rm_bench"
    chosen, rejected = texts_of(row, "chosen", schema, where), texts_of(row, "rejected", schema, where)
    for name, answers in (("chosen", chosen), ("rejected", rejected)):
        if len(answers) != len(STYLES):
            raise UserError(f"'{name}' has {len(answers)} answers", where=where, instead=f"one for each of {', '.join(STYLES)}")
    domain = text_of(row, "domain", schema, where)
    return BenchmarkItem(_id(row, schema, where), domain, prompt_of(row, "prompt", schema, where), chosen, rejected)


def rewardbench2(row: Row, where: str | None, dimension: Target | None) -> list[Record]:
    """Every chosen answer against every rejected one, in the subset's dimension; `pair_kind` and `domain` name the subset."""
    item = rewardbench2_item(row, where)
    return _pairs(item, dimension or _REWARDBENCH2.get(item.subset), where, styles=False)


def rm_bench(row: Row, where: str | None, dimension: Target | None) -> list[Record]:
    """The nine pairs of styles, in the dimension of the domain; `pair_kind` names both styles ("chat:concise/markdown")."""
    item = rm_bench_item(row, where)
    return _pairs(item, dimension or _RM_BENCH.get(item.subset), where, styles=True)


def _pairs(item: BenchmarkItem, dimension: Target | None, where: str | None, styles: bool) -> list[Record]:
    margins: dict[str, float] = {} if dimension is None else {dimension: UNKNOWN_MARGIN}
    pairs = []
    for i, chosen in enumerate(item.chosen):
        for j, rejected in enumerate(item.rejected):
            kind = f"{item.subset}:{STYLES[i]}/{STYLES[j]}" if styles else item.subset
            if chosen != rejected:
                pairs.append(pair(item.prompt, chosen, rejected, margins, where, domain=item.subset.lower(), pair_kind=kind))
    return pairs


def _id(row: Row, schema: str, where: str | None) -> str:
    value = row.get("id")
    return str(value) if isinstance(value, int) else text_of(row, "id", schema, where)
