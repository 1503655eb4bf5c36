"""The reward model: heads for the dimensions of the hierarchy, trained on pairs and graded answers.

Pairs are given, or sampled: verified-right against verified-wrong answers. What a stage trains on is made in `reward_dataset.py`,
how it trains in `reward_trainer.py` and `reward_losses.py`, how it is judged in `reward_evaluation.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.config.errors import UserError
from posttrain.config.schema import RewardStage, SamplingSection
from posttrain.data.encode import encode_document
from posttrain.data.mixture import sample_mixture
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_reward_model
from posttrain.model.modeling import MiniMaxText01ForSequenceClassification
from posttrain.reward.curriculum import adversarial_pairs
from posttrain.reward.heads import Heads
from posttrain.reward.learned import LearnedLevel
from posttrain.reward.verifiers import is_right, verify
from posttrain.stages.devices import placed
from posttrain.stages.files import read_records, write_records
from posttrain.stages.job import StageJob
from posttrain.stages.prepare import Preparation, Record, assistant, by_source, drawn_once, pair_length, right_and_wrong
from posttrain.stages.reward_dataset import differing, is_graded, pair_margins, reward_dataset
from posttrain.stages.reward_trainer import HeadsTrainer, HeldoutAccuracy, RewardStageTrainer
from posttrain.stages.sampling import as_sample


def prepare_reward(job: StageJob, folder: Path) -> dict[str, Any]:
    """Training pairs and graded answers in records.jsonl, held-out ones in heldout.jsonl and heldout_grades.jsonl.

    Given pairs and graded answers are taken as they are. From other prompts pairs are made: the better answer is a sample that
    the verifier accepts, else the demonstration. The worse one is a sample that it refuses; for a prompt whose samples are all
    right, the answer of a neighbouring prompt that is wrong here. Training takes every distinct wrong answer; the held-out set
    takes one of each prompt, drawn from them, so that both sets have the same mixture of near and wild mistakes.

    Raises:
        UserError: a source without usable records, too few held-out ones or none that differ, or sampled pairs for a stage
            without the dimension correctness.
    """
    stage, work = job.stage, Preparation.of(job)
    assert isinstance(stage, RewardStage)
    length = _item_length(work, stage)
    items = _items(work, work.load(stage.data), stage.sampling, every=True)
    if stage.curriculum is not None and stage.curriculum.adversarial:
        given = [item for item in items if not is_graded(item) and stage.data[item["source"]] > 0]
        items += adversarial_pairs(given, stage.curriculum.adversarial, job.config.seed)
    heldout = Preparation(job, work.tokenizer)
    everything = stage.sampling.model_copy(update={"num_prompts": None})
    made = _items(heldout, _candidates(heldout, stage), everything, every=False)
    trained = work.fitting(_naming(work, items, stage), length, stage.min_length)
    chosen = _by_weight(job, heldout.fitting(_naming(heldout, made, stage), length, stage.min_length), stage)
    pairs, grades = [item for item in chosen if not is_graded(item)], [item for item in chosen if is_graded(item)]
    if not any(differing(pair, stage.dimensions) for pair in pairs):
        raise UserError(
            "no held-out pair has a better answer in a dimension of the stage",
            where=f"stages.{job.name}.heldout",
            instead="name a source of such pairs",
        )
    write_records(folder / "heldout.jsonl", pairs)
    write_records(folder / "heldout_grades.jsonl", grades)
    counts = {"heldout_pairs": len(pairs)} | ({"heldout_grades": len(grades)} if grades else {})
    return {**work.write(folder, trained), **counts}


def train_reward(job: StageJob, folder: Path) -> None:
    """Train the stage and write its model into `folder`."""
    stage, init = job.stage, job.inputs["init"]
    assert isinstance(stage, RewardStage)
    tokenizer = load_tokenizer(init)
    heads = Heads(tuple(stage.dimensions), stage.ensemble)
    model = _initial_model(job, heads)
    scored = stage.curriculum is not None and stage.ensemble > 1 and _is_reward_model(job)
    items, per_step = reward_dataset(job, tokenizer, LearnedLevel(placed(model), tokenizer) if scored else None)
    kind = HeadsTrainer if "differs" in items.column_names else RewardStageTrainer
    trainer = kind(job, model, tokenizer, items, per_step)
    if stage.curriculum is not None or len(stage.dimensions) > 1:
        trainer.add_callback(HeldoutAccuracy(trainer, read_records(job.inputs["data"] / "heldout.jsonl")))
    trainer.run()
    trainer.save_final(folder)


def spread_members(model: MiniMaxText01ForSequenceClassification, heads: Heads, seed: int) -> None:
    """Give every member of an ensemble heads of its own to start from; a single member's stay zero.

    Members that started alike would agree about answers unlike any that they were trained on. The trunk's last norm gives
    hidden states of about unit size a channel, so noise of 1/sqrt(hidden) spreads scores by about one. The members' mean is
    taken off, so that at first the ensemble scores every answer 0, as a single head does.

    Args:
        model: its `score` is filled in place.
        heads: of the model.
        seed: equal seeds give equal heads.
    """
    if heads.ensemble == 1:
        return
    hidden = model.config.hidden_size
    drawn = torch.randn(len(heads.targets), heads.ensemble, hidden, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.score.weight.copy_(((drawn - drawn.mean(dim=1, keepdim=True)) / hidden**0.5).view(len(heads), hidden))


def _initial_model(job: StageJob, heads: Heads) -> MiniMaxText01ForSequenceClassification:
    """The init model under new heads, or with its own where it is a reward model of the same ones; UserError for others."""
    init = job.inputs["init"]
    if not _is_reward_model(job):
        model = load_reward_model(init, from_causal_lm=True, labels=heads.labels())
        spread_members(model, heads, job.config.seed)
        return model
    model = load_reward_model(init)
    found = Heads.from_config(model.config, str(init))
    if found != heads:
        raise UserError(
            f"'{job.stage.init}' has the heads {', '.join(found.labels())}, this stage asks for {', '.join(heads.labels())}",
            where=f"stages.{job.name}.dimensions",
            instead="name the same dimensions and ensemble, or start from a language model",
        )
    model.config.id2label = dict(enumerate(heads.labels()))  # a scalar model from elsewhere has no names
    model.config.label2id = {label: column for column, label in model.config.id2label.items()}
    return model


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


def _items(work: Preparation, records: Sequence[Record], sampling: SamplingSection, every: bool) -> list[Record]:
    """Given pairs and graded answers, then pairs made from the other prompts."""
    given = [record for record in records if "chosen" in record or is_graded(record)]
    prompts = [record for record in records if "chosen" not in record and not is_graded(record)]
    return given + (_sampled_pairs(work, prompts, sampling, every) if prompts else [])


def _sampled_pairs(work: Preparation, prompts: Sequence[Record], sampling: SamplingSection, every: bool) -> list[Record]:
    if _is_reward_model(work.job):
        raise UserError(
            f"prompts of {prompts[0]['source']} have no pairs, and '{work.job.stage.init}' makes a reward model, which cannot"
            " write answers",
            where=f"stages.{work.job.name}.init",
            instead="name sources of pairs or graded answers, or start from a language model",
        )
    sampled = work.sample(prompts, sampling, work.job.stage.max_length)
    labels = _labels_of_sampled(work.job)
    drawn = random.Random(work.job.config.seed)
    made: list[Record] = []
    for number, (record, answers) in enumerate(sampled):
        right, wrong = right_and_wrong(record, answers)
        success = {"success_rate": sum(answer.text in right for answer in answers) / len(answers)}
        right += [record["completion"][-1]["content"]] if "completion" in record else []
        if not wrong:
            wrong = _neighbours_answer(record, [neighbour for neighbour, _ in sampled[number + 1 :] + sampled[:number]])
            work.counts["answers_of_neighbours"] += len(wrong)
        if not right or not wrong:
            work.counts["no_pair"] += 1
            continue
        kept = {name: record[name] for name in record if name != "completion"} | labels
        kept |= success if _has_curriculum(work.job) else {}
        for text in wrong if every else [drawn.choice(wrong)]:
            made.append({**kept, "chosen": assistant(right[0]), "rejected": assistant(text)})
    return made


def _labels_of_sampled(job: StageJob) -> Record:
    """What a sampled pair says: right against wrong. Needless, and so left out, where correctness is all there is."""
    stage = job.stage
    assert isinstance(stage, RewardStage)
    if "correctness" not in stage.dimensions:
        raise UserError(
            "prompts without pairs give pairs of right and wrong answers, and the stage has no dimension 'correctness'",
            where=f"stages.{job.name}.dimensions",
            instead="add it, or take the prompts out of the data",
        )
    return {} if len(stage.dimensions) == 1 and not stage.margin_scale else {"margins": {"correctness": 1.0}}


def _naming(work: Preparation, items: Sequence[Record], stage: RewardStage) -> list[Record]:
    """Items that name a dimension of the stage; the others are counted and left out."""
    kept = []
    for item in items:
        if (
            any(target in item["grades"] for target in stage.dimensions)
            if is_graded(item)
            else pair_margins(item, stage.dimensions)
        ):
            kept.append(item)
        else:
            work.counts["no_dimension"] += 1
    return kept


def _item_length(work: Preparation, stage: RewardStage) -> Callable[[Record], int]:
    """Length of a pair as `pair_length`, of a graded answer its tokens."""
    of_pair = pair_length(work.tokenizer, stage)
    return lambda item: len(encode_document(work.tokenizer, item)) if is_graded(item) else of_pair(item)


def _has_curriculum(job: StageJob) -> bool:
    return isinstance(job.stage, RewardStage) and job.stage.curriculum is not None


def _neighbours_answer(record: Record, neighbours: Sequence[Record]) -> list[str]:
    """The first neighbour's answer that the verifier refuses here, in a list; empty if there is none."""
    for neighbour in neighbours:
        if "answer" in neighbour and not is_right(verify(as_sample(record, neighbour["answer"]))):
            return [neighbour["answer"]]
    return []
