"""The reward of one held-out answer as a tree, from what a run has on disk: no model is loaded and no judge is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import RewardSection
from posttrain.config.yaml_files import read_yaml
from posttrain.data.formats import VERIFIER_FIELDS
from posttrain.pipeline.folder import RunFolder
from posttrain.pipeline.reward_data import RewardRun, RewardStageData, ScoredPair
from posttrain.reward.heads import HeadScore
from posttrain.reward.hierarchy import HierarchicalReward
from posttrain.reward.types import RewardBreakdown, Sample
from posttrain.stages.files import read_records

Side = Literal["better", "worse"]
SIDES: dict[Side, str] = {"better": "chosen", "worse": "rejected"}


class RecordedScores:
    """A learned level that gives again what the evaluation wrote down."""

    def __init__(self, scores: Sequence[dict[str, HeadScore]]) -> None:
        self.recorded = list(scores)

    def dimension_scores(self, samples: Sequence[Sample]) -> list[dict[str, HeadScore]]:
        """The recorded scores; as many as there are samples, in their order."""
        if len(samples) != len(self.recorded):
            raise ValueError(f"{len(self.recorded)} scores were recorded, {len(samples)} are asked for")
        return self.recorded


def score_tree(run: RewardRun, number: int = 0, answer: Side = "better", stage: str | None = None) -> str:
    """How one answer's reward comes about, as text: the evaluated pair, then a line a level.

    The record's verifier and rules are asked again; the learned scores are the recorded ones. Composition is that of the first
    stage that uses the reward model, without its judges, else the default one.

    Args:
        run: with the stage's held-out pairs.
        number: of the pair, from 0.
        answer: which of its two answers.
        stage: reward stage; None takes the first that is no control.

    Raises:
        UserError: no such pair, or the run's held-out data are not there any more or are others than those evaluated.
    """
    asked = run.stage(stage)
    if not 0 <= number < len(asked.pairs):
        raise UserError(f"no pair {number}", where=asked.name, instead=f"there are {len(asked.pairs)}, counted from 0")
    pair, side = asked.pairs[number], SIDES[answer]
    record = _record_of(asked, number)
    breakdown = _breakdown(record, pair, side, composition_of(run, asked.name))
    text = pair.chosen if side == "chosen" else pair.rejected
    return f"prompt: {pair.prompt}\n{answer} answer: {text}\n\n{breakdown.explain()}"


def composition_of(run: RewardRun, stage: str) -> RewardSection:
    """The section `reward` of the first stage that uses this reward model, without judges; the default without such a stage.

    Raises:
        UserError: the section is of another version of the package.
    """
    stages = read_yaml(RunFolder(run.path).config_path).get("stages", {})
    for section in stages.values():
        found = section.get("reward") or {}
        if found.get("model") == stage:
            try:
                return RewardSection.model_validate({**found, "judges": {}})
            except ValidationError as error:
                raise UserError(
                    f"its section reward cannot be read ({error.errors()[0]['msg']})",
                    where=str(run.path),
                    instead="look at the run with the version of the package that made it",
                ) from None
    return RewardSection()


def _record_of(stage: RewardStageData, number: int) -> dict[str, Any]:
    """The held-out record of an evaluated pair: the evaluation writes a line a record, in the same order."""
    path, pair = stage.folder / "data" / "heldout.jsonl", stage.pairs[number]
    records = read_records(path)
    texts = [_texts(record) for record in records[number : number + 1]]
    if texts != [(pair.prompt, pair.chosen, pair.rejected)]:
        raise UserError(f"pair {number} of the evaluation is not there", where=str(path), instead="evaluate the stage again")
    return records[number]


def _texts(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt, better and worse answer as the evaluation writes them down."""
    prompt = "\n\n".join(message["content"] for message in record.get("prompt", ()))
    return prompt, record["chosen"][-1]["content"], record["rejected"][-1]["content"]


def _breakdown(record: Mapping[str, Any], pair: ScoredPair, side: str, section: RewardSection) -> RewardBreakdown:
    place = 0 if side == "chosen" else 1
    heads = {target: HeadScore(pair.means[target][place], pair.spreads[target][place]) for target in pair.means}
    messages = record[side]
    # As `posttrain.stages.sampling.as_sample` makes it, which would import torch.
    reference = {name: record[name] for name in VERIFIER_FIELDS if name in record}
    sample = Sample([*record.get("prompt", ()), *messages[:-1]], messages[-1]["content"], reference)
    return HierarchicalReward(section, RecordedScores([heads])).score([sample])[0]
