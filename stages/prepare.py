"""Data of a stage: demonstrations joined by verified samples, pairs by reward, or prompts.

Everything is written as records.jsonl, each record with the `source` (SOURCE/SPLIT) whose weight it falls under, and
stats.json with counts and `seconds`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.config.errors import UserError
from posttrain.config.schema import DPOStage, RewardSection, RLStage, SamplingSection, SFTStage, StageSection
from posttrain.data.encode import encode_document, encode_pair, encode_prompt
from posttrain.data.mixture import sample_mixture
from posttrain.data.sources import load_split
from posttrain.data.tokenizer import load_tokenizer
from posttrain.reward.hierarchy import passed_gates, verified
from posttrain.reward.types import RewardBreakdown, Sample
from posttrain.reward.verifiers import is_right, verify
from posttrain.stages.engines import checkpoint_engine
from posttrain.stages.files import write_records
from posttrain.stages.job import StageJob
from posttrain.stages.rewards import build_reward, note_provenance
from posttrain.stages.sampling import Answer, as_sample, draw, require_prompts, stream

Record = dict[str, Any]


@dataclass
class Preparation:
    """What one stage's preparation works with.

    Attributes:
        job: the stage.
        tokenizer: of the init model.
        counts: numbers for stats.json.
    """

    job: StageJob
    tokenizer: PreTrainedTokenizerBase
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, job: StageJob) -> Preparation:
        """With the tokenizer of the stage's init model."""
        return cls(job, load_tokenizer(job.inputs["init"]))

    def load(self, refs: Mapping[str, float]) -> list[Record]:
        """Records of all sources, each with its `source`."""
        return [{**record, "source": ref} for ref in refs for record in load_split(self.job.config, ref)]

    def fitting(self, records: Sequence[Record], length: Callable[[Record], int], shortest: int = 1) -> list[Record]:
        """Records between `shortest` and the stage's max_length tokens; the others are counted and left out."""
        longest = self.job.stage.max_length
        kept = []
        for record in records:
            tokens = length(record)
            if tokens > longest or tokens < shortest:
                self.counts["too_long" if tokens > longest else "too_short"] += 1
            else:
                kept.append(record)
        return kept

    def sample(self, records: Sequence[Record], sampling: SamplingSection, longest: int) -> list[tuple[Record, list[Answer]]]:
        """Records whose prompt leaves room for an answer within `longest` tokens, each with its drawn answers.

        The others are counted and left out. Of more records than `num_prompts` the first are taken, source by source in turn,
        so that each has its share.
        """
        chosen = _in_turn(records)[: sampling.num_prompts]
        room = longest - sampling.max_new_tokens
        chosen = [record for record in chosen if self._can_answer(record, room)]
        seeds = [(self.job.config.seed, stream(self.job.name), number) for number in range(len(chosen))]
        with checkpoint_engine(self.job.config, self.job.inputs["init"]) as engine:
            drawn = draw(engine, self.tokenizer, [r["prompt"] for r in chosen], sampling, seeds)
        self.counts["prompts_sampled"] += len(chosen)
        self.counts["answers_drawn"] += sum(len(answers) for answers in drawn)
        return list(zip(chosen, drawn, strict=True))

    def _can_answer(self, record: Record, room: int) -> bool:
        if "prompt" not in record:
            self.counts["no_prompt"] += 1
        elif len(encode_prompt(self.tokenizer, record["prompt"])) > room:
            self.counts["prompt_too_long"] += 1
        else:
            return True
        return False

    def write(self, folder: Path, records: Sequence[Record]) -> dict[str, Any]:
        """Write records.jsonl; returns the statistics. UserError where a source with weight has no records."""
        found = Counter(record["source"] for record in records)
        for ref, weight in self.job.stage.data.items():
            if weight > 0 and not found[ref]:
                dropped = ", ".join(f"{name} {number}" for name, number in sorted(self.counts.items()))
                raise UserError(
                    f"no usable records of {ref}" + (f" ({dropped})" if dropped else ""),
                    where=f"stages.{self.job.name}.data",
                    instead="check lengths, sampling and the source",
                )
        write_records(folder / "records.jsonl", records)
        return {"records": len(records), **self.counts}


def prepare_sft(job: StageJob, folder: Path) -> dict[str, Any]:
    """Demonstrations, and samples of the init model that the reward accepts (paper section 5.3)."""
    stage, work = job.stage, Preparation.of(job)
    assert isinstance(stage, SFTStage)
    records = work.load(stage.data)
    kept = [r for r in records if is_demonstration(r) or "messages" in r] if stage.demonstrations else []
    if stage.sampling is not None:
        kept += _accepted(work, records, stage.sampling, stage.reward)
    return work.write(folder, work.fitting(kept, lambda r: len(encode_document(work.tokenizer, r)), stage.min_length))


def prepare_dpo(job: StageJob, folder: Path) -> dict[str, Any]:
    """Given pairs, and for prompts without one the best against the worst of several samples by reward (paper section 5.4.1)."""
    stage, work = job.stage, Preparation.of(job)
    assert isinstance(stage, DPOStage)
    records = work.load(stage.data)
    pairs = [record for record in records if "chosen" in record]
    prompts = [record for record in records if "chosen" not in record]
    if prompts:
        pairs += _best_and_worst(work, prompts, stage)
    return work.write(folder, work.fitting(pairs, pair_length(work.tokenizer, stage), stage.min_length))


def prepare_rl(job: StageJob, folder: Path) -> dict[str, Any]:
    """The prompts of every step, in order; none comes twice."""
    stage, work = job.stage, Preparation.of(job)
    assert isinstance(stage, RLStage)
    room = stage.sampling.max_new_tokens
    loaded = work.load(stage.data)
    for ref in stage.data:
        require_prompts([record for record in loaded if record["source"] == ref], ref)
    records = work.fitting(loaded, lambda r: len(encode_prompt(work.tokenizer, r["prompt"])) + room, stage.min_length)

    def too_few(ref: str, needed: int, found: int) -> UserError:
        return UserError(
            f"{needed} prompts of {ref} are needed, it has {found} of fitting length",
            where=f"stages.{job.name}.data",
            instead="add records or take fewer steps: online RL uses a prompt once",
        )

    return work.write(folder, drawn_once(records, stage.data, stage.steps * stage.prompts_per_step, job.config.seed, too_few))


def by_source(records: Sequence[Record], refs: Iterable[str]) -> dict[str, list[Record]]:
    """The records of each source, in their order."""
    return {ref: [record for record in records if record["source"] == ref] for ref in refs}


def drawn_once(
    records: Sequence[Record],
    weights: Mapping[str, float],
    total: int,
    seed: int,
    too_few: Callable[[str, int, int], UserError],
) -> list[Record]:
    """`total` records, each source's number by its weight, none twice.

    Raises:
        UserError: `too_few(source, wanted, found)` for a source with fewer records than its share.
    """
    sources = by_source(records, weights)
    counts = {ref: len(members) for ref, members in sources.items()}
    order = sample_mixture(counts, weights, total, seed)
    for ref, wanted in Counter(ref for ref, _ in order).items():
        if wanted > counts[ref]:
            raise too_few(ref, wanted, counts[ref])
    return [sources[ref][index] for ref, index in order]


def pair_length(tokenizer: PreTrainedTokenizerBase, stage: StageSection) -> Callable[[Record], int]:
    """Length of a pair's longer document; a pair that does not fit one pack together counts as too long."""

    def length(record: Record) -> int:
        chosen, rejected = encode_pair(tokenizer, record)
        together = len(chosen) + len(rejected)
        return max(len(chosen), len(rejected)) if together <= stage.pack_length else stage.max_length + 1

    return length


def is_demonstration(record: Record) -> bool:
    """Whether a record has an answer worth imitating: a graded one is good or bad."""
    return "completion" in record and "grades" not in record


def assistant(text: str) -> list[dict[str, str]]:
    """A text as the assistant's turn."""
    return [{"role": "assistant", "content": text}]


def right_and_wrong(record: Record, answers: Sequence[Answer]) -> tuple[list[str], list[str]]:
    """Distinct texts of finished answers that the verifier calls right, and of all that it does not, in order drawn."""
    right: dict[str, None] = {}
    wrong: dict[str, None] = {}
    for answer in answers:
        accepted = is_right(verify(as_sample(record, answer.text)))
        if not accepted:
            wrong[answer.text] = None
        elif answer.finished:
            right[answer.text] = None
    return list(right), list(wrong)


def accept(record: Record, answers: Sequence[Answer], breakdowns: Sequence[RewardBreakdown]) -> list[str]:
    """Texts of a prompt's answers that are worth training on.

    Only answers that the model ended itself, that pass the gates and are not dropped: where the record has a verifier all
    distinct right ones, else the one with the highest total, the first of several.
    """
    candidates = [
        (answer.text, breakdown)
        for answer, breakdown in zip(answers, breakdowns, strict=True)
        if answer.finished and not breakdown.dropped and passed_gates(breakdown)
    ]
    if "verifier" in record:
        return list(dict.fromkeys(text for text, breakdown in candidates if verified(breakdown)))
    return [max(candidates, key=lambda one: one[1].total)[0]] if candidates else []


def _accepted(work: Preparation, records: Sequence[Record], sampling: SamplingSection, section: RewardSection) -> list[Record]:
    sampled = work.sample(records, sampling, work.job.stage.max_length)
    note_provenance(work.job, section)
    flat = [as_sample(record, answer.text) for record, answers in sampled for answer in answers]
    breakdowns = iter(_scored(work, section, flat))
    accepted = []
    for record, answers in sampled:
        texts = accept(record, answers, [next(breakdowns) for _ in answers])
        kept = {name: value for name, value in record.items() if name not in ("completion", "grades", "train_on_all_answers")}
        accepted += [{**kept, "completion": assistant(text)} for text in texts]
    work.counts["answers_accepted"] += len(accepted)
    return accepted


def _best_and_worst(work: Preparation, prompts: Sequence[Record], stage: DPOStage) -> list[Record]:
    sampled = work.sample(prompts, stage.sampling, stage.max_length)
    competing = [(record, _candidates(record, answers, stage.demonstrations)) for record, answers in sampled]
    note_provenance(work.job, stage.reward)
    flat = [as_sample(record, text) for record, candidates in competing for text, _ in candidates]
    breakdowns = iter(_scored(work, stage.reward, flat))
    pairs = []
    for record, candidates in competing:
        found = [(next(breakdowns), text, finished) for text, finished in candidates]
        scored = [
            (breakdown.total, text, finished and passed_gates(breakdown))
            for breakdown, text, finished in found
            if not breakdown.dropped
        ]
        # Only an answer that the model ended itself may be preferred: training on it teaches where to stop. Nor one that a
        # gate stopped: at min_margin 0 it could win by a tie, since a wrong answer may score as little as a closed gate gives.
        best = max((one for one in scored if one[2]), key=lambda one: one[0], default=None)
        worst = min(scored, key=lambda one: one[0], default=None)
        if best is None or worst is None or best[0] - worst[0] < stage.min_margin or best[1] == worst[1]:
            work.counts["margin_too_small"] += 1
            continue
        kept = {name: record[name] for name in record if name not in ("completion", "grades")}
        pairs.append({**kept, "chosen": assistant(best[1]), "rejected": assistant(worst[1]), "margin": best[0] - worst[0]})
    return pairs


def _scored(work: Preparation, section: RewardSection, samples: Sequence[Sample]) -> list[RewardBreakdown]:
    """Breakdowns of all samples; those without a verdict, and those that a gate stopped, are counted."""
    with build_reward(work.job, section) as reward:
        breakdowns = reward.score(samples)
    for name, number in (
        ("no_verdict", sum(breakdown.dropped for breakdown in breakdowns)),
        ("stopped_by_gate", sum(not passed_gates(breakdown) for breakdown in breakdowns)),
    ):
        if number:
            work.counts[name] += number
    return breakdowns


def _candidates(record: Record, answers: Sequence[Answer], demonstrations: bool) -> list[tuple[str, bool]]:
    """Text of every candidate, and whether it was ended: the samples, then the demonstration, where it competes."""
    candidates = [(answer.text, answer.finished) for answer in answers]
    if demonstrations and is_demonstration(record):
        candidates.append((str(record["completion"][-1]["content"]), True))
    return candidates


def _in_turn(records: Sequence[Record]) -> list[Record]:
    """Records with those of the sources taking turns, each source in its order."""
    place: Counter[str] = Counter()
    keyed = []
    for number, record in enumerate(records):
        keyed.append((place[record["source"]], number))
        place[record["source"]] += 1
    return [records[number] for _, number in sorted(keyed)]
