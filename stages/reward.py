"""The reward model: a scalar head, trained on verified-right against verified-wrong answers.

Built on TRL's `RewardTrainer`, whose loss (Bradley-Terry, with a pull of the mean reward to zero) is the one wanted. It
pads its batches; the model takes the padding out again, so no compute is spent on it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from posttrain.config.errors import UserError
from posttrain.config.schema import RewardStage, SamplingSection
from posttrain.data.encode import encode_pair
from posttrain.data.mixture import sample_mixture
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_reward_model
from posttrain.model.modeling import MiniMaxText01ForSequenceClassification
from posttrain.reward.learned import LearnedLevel
from posttrain.reward.verifiers import is_right, verify
from posttrain.stages import group
from posttrain.stages.arguments import training_arguments
from posttrain.stages.devices import placed
from posttrain.stages.files import read_records, write_records
from posttrain.stages.job import StageJob
from posttrain.stages.prepare import Preparation, Record, assistant, by_source, drawn_once, pair_length, right_and_wrong
from posttrain.stages.sampling import as_sample
from posttrain.stages.trainer import StageTrainer

logger = logging.getLogger(__name__)


class RewardStageTrainer(StageTrainer, RewardTrainer):
    """TRL's trainer with this project's checkpoints, order and metrics; the loss stays TRL's.

    Every rank has equally many pairs, so the mean of the ranks' means is the mean over the step.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        job: StageJob,
        model: MiniMaxText01ForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Dataset,
        pairs_per_step: int,
    ) -> None:
        """Train `model` in place on `pairs` (columns `chosen_ids`, `rejected_ids`), in their order."""
        stage = job.stage
        assert isinstance(stage, RewardStage)
        arguments = training_arguments(
            job, pairs_per_step, RewardConfig, max_length=None, center_rewards_coefficient=stage.center_coefficient
        )
        super().__init__(
            job,
            model,
            tokenizer,
            pairs,
            pairs_per_step,
            args=arguments,
            data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id),
        )

    def count_items(self, batch: Mapping[str, Any]) -> tuple[list[int], int]:
        """Nothing (TRL's loss is a mean); tokens without padding."""
        return [], int(batch["attention_mask"].sum())


def prepare_reward(job: StageJob, folder: Path) -> dict[str, Any]:
    """Training pairs in records.jsonl, held-out pairs in heldout.jsonl.

    The better answer is a sample that the verifier accepts, else the demonstration. The worse one is a sample that it
    refuses; for a prompt whose samples are all right, the answer of a neighbouring prompt that is wrong here. Training
    takes every distinct wrong answer; the held-out set takes one of each prompt, drawn from them, so that both sets have
    the same mixture of near and wild mistakes.
    """
    stage, work = job.stage, Preparation.of(job)
    assert isinstance(stage, RewardStage)
    length = pair_length(work.tokenizer, stage)
    pairs = work.fitting(_pairs(work, work.load(stage.data), stage.sampling, every=True), length, stage.min_length)
    heldout = Preparation(job, work.tokenizer)
    made = _pairs(heldout, _candidates(heldout, stage), stage.sampling.model_copy(update={"num_prompts": None}), every=False)
    chosen = _by_weight(job, heldout.fitting(made, length, stage.min_length), stage)
    write_records(folder / "heldout.jsonl", chosen)
    return {**work.write(folder, pairs), "heldout_pairs": len(chosen)}


def reward_dataset(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, int]:
    """Pairs of every step, in order, and their number a step: as many as fill the step's packed sequences on average."""
    stage = job.stage
    sources: dict[str, list[dict[str, list[int]]]] = {ref: [] for ref in stage.data}
    tokens = 0
    for record in read_records(job.inputs["data"] / "records.jsonl"):
        chosen, rejected = encode_pair(tokenizer, record)
        sources[record["source"]].append({"chosen_ids": chosen.input_ids, "rejected_ids": rejected.input_ids})
        tokens += len(chosen) + len(rejected)
    counts = {ref: len(members) for ref, members in sources.items()}
    world = group.world_size()
    filling = stage.batch_size * stage.pack_length * sum(counts.values()) / tokens
    per_step = max(int(filling) // stage.batch_size, 1) * stage.batch_size
    if per_step % world:
        raise UserError(f"{per_step} pairs a step do not divide over {world} workers", where=f"stages.{job.name}.batch_size")
    order = sample_mixture(counts, stage.data, stage.steps * per_step, job.config.seed)
    return Dataset.from_list([sources[ref][index] for ref, index in order]), per_step


def train_reward(job: StageJob, folder: Path) -> None:
    """Train the stage and write its model into `folder`."""
    init = job.inputs["init"]
    tokenizer = load_tokenizer(init)
    pairs, per_step = reward_dataset(job, tokenizer)
    model = load_reward_model(init, from_causal_lm=not _is_reward_model(job))
    trainer = RewardStageTrainer(job, model, tokenizer, pairs, per_step)
    trainer.run()
    trainer.save_final(folder)


def pair_accuracy(folder: Path, heldout: Path) -> float:
    """Share of held-out pairs whose better answer scores higher; equal scores count half."""
    learned = LearnedLevel(placed(load_reward_model(folder)), load_tokenizer(folder))
    records = read_records(heldout)
    better = learned.scores([as_sample(r, r["chosen"][-1]["content"]) for r in records])
    worse = learned.scores([as_sample(r, r["rejected"][-1]["content"]) for r in records])
    return sum((b > w) + 0.5 * (b == w) for b, w in zip(better, worse, strict=True)) / len(records)


def _is_reward_model(job: StageJob) -> bool:
    stage = job.config.stages.get(job.stage.init)
    return isinstance(stage, RewardStage)


def _candidates(work: Preparation, stage: RewardStage) -> list[Record]:
    """Held-out records by the weights of their sources, twice as many as asked for because not each gives a pair."""
    sources = by_source(work.load(stage.heldout), stage.heldout)
    counts = {ref: len(members) for ref, members in sources.items()}
    order = sample_mixture(counts, stage.heldout, 2 * stage.heldout_pairs, work.job.config.seed)
    return [sources[ref][index] for ref, index in dict.fromkeys(order)]


def _by_weight(job: StageJob, pairs: Sequence[Record], stage: RewardStage) -> list[Record]:
    """`heldout_pairs` of the pairs, each source's number by its weight. UserError where a source has too few."""

    def too_few(ref: str, wanted: int, found: int) -> UserError:
        return UserError(
            f"{found} held-out pairs of {ref} could be made, {wanted} are asked for",
            where=f"stages.{job.name}.heldout_pairs",
            instead="add records or ask for fewer",
        )

    return drawn_once(pairs, stage.heldout, stage.heldout_pairs, job.config.seed, too_few)


def _pairs(work: Preparation, records: Sequence[Record], sampling: SamplingSection, every: bool) -> list[Record]:
    given = [record for record in records if "chosen" in record]
    sampled = work.sample([record for record in records if "chosen" not in record], sampling, work.job.stage.max_length)
    drawn = random.Random(work.job.config.seed)
    made: list[Record] = []
    for number, (record, answers) in enumerate(sampled):
        right, wrong = right_and_wrong(record, answers)
        right += [record["completion"][-1]["content"]] if "completion" in record else []
        if not wrong:
            wrong = _neighbours_answer(record, [neighbour for neighbour, _ in sampled[number + 1 :] + sampled[:number]])
            work.counts["answers_of_neighbours"] += len(wrong)
        if not right or not wrong:
            work.counts["no_pair"] += 1
            continue
        kept = {name: record[name] for name in record if name != "completion"}
        for text in wrong if every else [drawn.choice(wrong)]:
            made.append({**kept, "chosen": assistant(right[0]), "rejected": assistant(text)})
    return given + made


def _neighbours_answer(record: Record, neighbours: Sequence[Record]) -> list[str]:
    """The first neighbour's answer that the verifier refuses here, in a list; empty if there is none."""
    for neighbour in neighbours:
        if "answer" in neighbour and not is_right(verify(as_sample(record, neighbour["answer"]))):
            return [neighbour["answer"]]
    return []
