"""Online RL with verifiable rewards, synchronous: sample, score, one or more updates.

The loop is transformers' `Trainer`: TRL 1.16's AsyncGRPOTrainer refuses recurrent layers. A dataset item is one prompt; a
training step samples from the weights as they are, so rollouts are a pure function of seed, step, weights and prompts.
Several updates on one batch of rollouts all happen within a step: checkpoints lie between steps, so none holds rollouts.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from posttrain.config.schema import RLStage
from posttrain.data.layout import SequenceLayout
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_causal_lm
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.reward.guards.drift import DriftMonitor
from posttrain.reward.types import RewardBreakdown, RewardModel
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.noise import derive_seed
from posttrain.rollout.types import RolloutEngine
from posttrain.rollout.weights.source import ModelSource
from posttrain.stages import group
from posttrain.stages.advantages import balance, group_advantages
from posttrain.stages.devices import placed
from posttrain.stages.engines import chosen_engine, vllm_engine
from posttrain.stages.files import read_records
from posttrain.stages.job import StageJob
from posttrain.stages.microbatches import MicroBatch, micro_batches
from posttrain.stages.objectives import OBJECTIVES, PolicyBatch, sample_weights
from posttrain.stages.rewards import build_reward, pin_provenance
from posttrain.stages.sampling import Answer, as_sample, draw, stream
from posttrain.stages.scored import ScoredAnswer, step_facts, step_metrics
from posttrain.stages.trainer import StageTrainer

Record = dict[str, Any]
T = TypeVar("T")

logger = logging.getLogger(__name__)


class RLStageTrainer(StageTrainer):
    """`updates_per_step` optimizer steps a batch of prompts, with the stage's objective."""

    section: RLStage

    def __init__(
        self,
        job: StageJob,
        model: MiniMaxText01ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Record],
        reward: RewardModel,
        reference: MiniMaxText01ForCausalLM | None,
        engine: RolloutEngine | None = None,
    ) -> None:
        """Train `model` in place.

        Args:
            job, model, tokenizer: as in `StageTrainer`.
            prompts: records of all steps, `prompts_per_step` for each.
            reward: scores answers.
            reference: model of the KL term, or None without one.
            engine: draws answers, from the step's weights; None draws from `model` itself.
        """
        stage = job.stage
        assert isinstance(stage, RLStage)
        self.reward = reward
        self.reference = reference
        self.engine = engine
        self.drift = DriftMonitor()
        super().__init__(job, model, tokenizer, list(prompts), stage.prompts_per_step)

    def count_items(self, batch: list[Record]) -> tuple[list[int], int]:
        """Nothing is known before sampling."""
        return [], 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Sample, score, make all updates but the last, and leave the gradient of the last one to the Trainer.

        Returns:
            mean loss of the updates, times the number of ranks.
        """
        answers = self._sample(model, inputs)
        samples = [as_sample(record, a.text) for record, drawn in zip(inputs, answers, strict=True) for a in drawn]
        breakdowns = self.reward.score(samples)
        flat = [answer for drawn in answers for answer in drawn]
        weights, advantages = self._credit(flat, breakdowns)
        losses = []
        for number, part in enumerate(self._parts(len(flat))):
            if number:
                self._update(model)
            batches = self._micro_batches(flat, weights, advantages, part)
            losses.append(self.accumulate(model, [partial(self._loss, model, batch) for batch in batches]))
        return torch.stack(losses).mean()

    def _parts(self, samples: int) -> list[list[int]]:
        """Indices of the samples of each update, out of so many.

        Prompts are dealt in turn, so that a rank's own deal and the deal over all ranks agree: both this rank's first
        prompt and its number of prompts are multiples of `updates_per_step`.
        """
        updates, size = self.section.updates_per_step, self.section.sampling.samples_per_prompt
        return [[i for i in range(samples) if i // size % updates == update] for update in range(updates)]

    def _update(self, model: nn.Module) -> None:
        """What the Trainer does after a step, at the same learning rate. DeepSpeed did it at the end of the backward pass."""
        if self.is_deepspeed_enabled:
            return
        assert self.optimizer is not None
        self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        model.zero_grad()

    def _sample(self, model: nn.Module, records: Sequence[Record]) -> list[list[Answer]]:
        """Answers of this rank's prompts from the weights as they are."""
        stage, step = self.section, self.state.global_step
        first = group.rank() * len(records)
        name = stream(self.job.name)
        seeds = [(self.job.config.seed, name, step, first + number) for number in range(len(records))]
        prompts = [record["prompt"] for record in records]
        if self.engine is not None:
            self.engine.update_weights(ModelSource(model, version=step))
            return draw(self.engine, self.tokenizer, prompts, stage.sampling, seeds)
        with _whole_model(self, model) as whole:
            return draw(EmbeddedEngine(whole, version=step), self.tokenizer, prompts, stage.sampling, seeds)

    def _credit(self, answers: Sequence[Answer], breakdowns: Sequence[RewardBreakdown]) -> tuple[list[float], list[float]]:
        """Loss weight of a token in its update, and advantage, of each of this rank's samples, from those of all ranks.

        Both are 0 for a dropped sample.
        """
        stage = self.section
        own = [ScoredAnswer.of(answer, breakdown) for answer, breakdown in zip(answers, breakdowns, strict=True)]
        everywhere = group.gather(own)
        samples = [sample for of_rank in everywhere for sample in of_rank]
        lengths = [sample.length for sample in samples]
        self._note_step(samples)
        self.trained_tokens += sum(lengths) + sum(sample.prompt_length for sample in samples)
        rewards = [(sample.total, not sample.dropped) for sample in samples]
        if stage.shuffle_rewards:
            rewards = shuffled_rewards(rewards, self.job.config.seed, self.state.global_step)
        weights = [0.0] * len(samples)
        for part in self._parts(len(samples)):
            kept = [i for i in part if rewards[i][1]]
            of_part = sample_weights(stage.objective, [lengths[i] for i in kept]) if kept else []
            for index, weight in zip(kept, of_part, strict=True):
                weights[index] = weight
        advantages = group_advantages(
            torch.tensor([total for total, _ in rewards], dtype=torch.float64),
            stage.sampling.samples_per_prompt,
            stage.scale_advantages,
            torch.tensor([kept for _, kept in rewards]),
        )
        if stage.balance_advantages:
            mass = torch.tensor([w * n for w, n in zip(weights, lengths, strict=True)], dtype=torch.float64)
            advantages = balance(advantages, mass)
        first = sum(len(of_rank) for of_rank in everywhere[: group.rank()])
        mine = slice(first, first + len(own))
        return weights[mine], advantages.tolist()[mine]

    def _note_step(self, samples: Sequence[ScoredAnswer]) -> None:
        """The step's metrics, and alarms where the policy drifts from what the reward means."""
        for name, value in step_metrics(samples).items():
            self.note(name, value)
        alarms = self.drift.update(step_facts(samples))
        self.note("alarm", len(alarms))
        for alarm in alarms:
            self.note(f"alarm/{alarm.kind}", 1.0)
            if group.rank() == 0:
                logger.warning("%s, step %d: %s", self.job.name, self.state.global_step, alarm.text)

    def _micro_batches(
        self, answers: Sequence[Answer], weights: Sequence[float], advantages: Sequence[float], part: Sequence[int]
    ) -> list[MicroBatch]:
        """Micro-batches of this rank's samples `part`; every rank has equally many: each takes part in every exchange."""
        stage = self.section
        # An advantage of zero gives no gradient, unless the KL term does; a weight of zero gives none at all.
        taking_part = [i for i in part if weights[i] and (advantages[i] != 0 or self.reference is not None)]
        batches = micro_batches(answers, weights, advantages, taking_part, max(stage.pack_length, stage.max_length))
        idle = MicroBatch.idle(answers[0])
        return batches + [idle] * (max(group.gather(len(batches)) + [1]) - len(batches))

    def _loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        device = self.args.device
        tokens = batch.tokens.to(device)
        layout = SequenceLayout.from_lengths(batch.lengths, device)
        output = model(tokens, layout=layout, return_token_logprobs=True, temperature=batch.temperature)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference.token_logprobs(tokens, layout, batch.temperature)
        policy = PolicyBatch(
            output.token_logprobs, batch.old_logprobs.to(device), reference, batch.advantages.to(device), batch.mask.to(device)
        )
        losses = OBJECTIVES[self.section.objective](policy, self.section)
        return (losses * batch.weights.to(device)).sum() * self.args.world_size


def shuffled_rewards(rewards: Sequence[T], seed: int, step: int) -> list[T]:
    """The step's rewards, whatever describes them, in another order, drawn from seed and step alone, so equal on every rank."""
    order = random.Random(derive_seed(seed, stream("shuffle"), step))
    return order.sample(list(rewards), len(rewards))


def train_rl(job: StageJob, folder: Path) -> None:
    """Train the stage and write its model into `folder`."""
    stage = job.stage
    assert isinstance(stage, RLStage)
    init = job.inputs["init"]
    reference = placed(load_causal_lm(init)).eval().requires_grad_(False) if stage.kl_coef else None
    prompts = read_records(job.inputs["data"] / "records.jsonl")
    pin_provenance(job, stage.reward)
    with build_reward(job, stage.reward) as reward:
        engine = vllm_engine(job.config, init) if chosen_engine(job.config) == "vllm" else None
        try:
            trainer = RLStageTrainer(job, load_causal_lm(init), load_tokenizer(init), prompts, reward, reference, engine)
            trainer.run()
        finally:
            if engine is not None:
                engine.close()
    trainer.save_final(folder)


@contextmanager
def _whole_model(trainer: RLStageTrainer, model: nn.Module) -> Iterator[MiniMaxText01ForCausalLM]:
    """The model under its wrappers, in eval mode, with all parameters present (ZeRO-3 gathers them for the while)."""
    from trl.models.utils import unwrap_model_for_generation

    with unwrap_model_for_generation(model, trainer.accelerator) as whole:
        training = whole.training
        whole.eval()
        try:
            yield whole
        finally:
            whole.train(training)
