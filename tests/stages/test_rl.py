"""Online RL: what a step depends on, and that its gradient is the objective's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.config.errors import UserError
from posttrain.data.layout import SequenceLayout
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_causal_lm
from posttrain.reward.guards.drift import DriftMonitor
from posttrain.reward.guards.provenance import folder_hash
from posttrain.reward.types import LevelScore, RewardBreakdown, Sample
from posttrain.stages import run
from posttrain.stages.advantages import balance, group_advantages
from posttrain.stages.files import read_json, read_records
from posttrain.stages.job import StageJob
from posttrain.stages.metrics import read_metrics
from posttrain.stages.microbatches import micro_batches
from posttrain.stages.objectives import sample_weights
from posttrain.stages.rl import RLStageTrainer, shuffled_rewards
from posttrain.stages.sampling import Answer
from posttrain.stages.scored import ScoredAnswer
from tests.stages.crash import differing
from tests.stages.tasks import RL, make_job, make_judge


class ByText:
    """A reward that is a function of the answer's characters, the same on every machine."""

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        return [self._one(sum(sample.answer.encode()) % 7 / 6) for sample in samples]

    def _one(self, total: float) -> RewardBreakdown:
        return RewardBreakdown(total, (LevelScore("verifier", total, 1.0, total),))


def trainer_of(job: StageJob, reference: bool = False) -> RLStageTrainer:
    init = job.inputs["init"]
    prompts = read_records(job.inputs["data"] / "records.jsonl")
    frozen = load_causal_lm(init) if reference else None
    return RLStageTrainer(job, load_causal_lm(init), load_tokenizer(init), prompts, ByText(), frozen)


def values(job: StageJob, name: str) -> list[float]:
    return [record["value"] for record in read_metrics(job.metrics_path) if record["name"] == name]


def test_rollouts_are_a_function_of_seed_step_and_weights(tmp_path: Path) -> None:
    job = make_job(tmp_path, RL)
    trainer, other = trainer_of(job), trainer_of(job)
    records = trainer.train_dataset[:4]
    torch.manual_seed(5)
    first = trainer._sample(trainer.model, records)
    torch.manual_seed(6)
    assert other._sample(other.model, records) == first
    other.state.global_step = 1
    assert other._sample(other.model, records) != first
    texts = {answer.text for answers in first for answer in answers}
    assert len(texts) > 12, "samples of a group differ"


def test_old_logprobs_are_those_the_model_gives(tmp_path: Path) -> None:
    job = make_job(tmp_path, {**RL, "sampling": {**RL["sampling"], "temperatures": [1.0, 0.7]}})
    trainer = trainer_of(job)
    flat = [answer for answers in trainer._sample(trainer.model, trainer.train_dataset[:4]) for answer in answers]
    batches = micro_batches(flat, [1.0] * 16, [1.0] * 16, range(16), 128)
    assert len({batch.temperature for batch in batches}) == 2
    for batch in batches:
        assert batch.tokens.shape[1] <= 128
        layout = SequenceLayout.from_lengths(batch.lengths)
        with torch.no_grad():
            new = trainer.model.token_logprobs(batch.tokens, layout, batch.temperature)
        assert ((new - batch.old_logprobs) * batch.mask).abs().max() < 1e-5


@pytest.mark.parametrize("pack_length", [64, 1024])
@pytest.mark.parametrize("objective", ["minimax01", "grpo", "cispo"])
def test_the_step_gradient_is_the_policy_gradient_however_it_is_split(tmp_path: Path, objective: str, pack_length: int) -> None:
    job = make_job(tmp_path, {**RL, "objective": objective, "pack_length": pack_length})
    trainer = trainer_of(job)
    trainer.create_optimizer_and_scheduler(4)
    records = trainer.train_dataset[:4]
    trainer.training_step(trainer.model, records)
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    trainer.model.zero_grad()
    answers = [answer for of in trainer._sample(trainer.model, records) for answer in of]
    rewards = torch.tensor([b.total for b in ByText().score([Sample([], a.text, {}) for a in answers])], dtype=torch.float64)
    lengths = [len(answer.token_ids) for answer in answers]
    weights = sample_weights(objective, lengths)
    mass = torch.tensor(weights, dtype=torch.float64) * torch.tensor(lengths)
    advantages = balance(group_advantages(rewards, 4, False), mass)
    loss = torch.tensor(0.0)
    for answer, weight, advantage in zip(answers, weights, advantages.tolist(), strict=True):
        ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
        logprobs = trainer.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        loss = loss - weight * advantage * logprobs[len(answer.prompt_ids) - 1 :].sum()
    loss.backward()
    largest = max(float(grad.abs().max()) for grad in found.values())
    assert largest > 1e-4
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.grad - found[name]).abs().max() < 2e-5 * largest + 1e-7, name


def test_several_updates_on_one_batch_of_rollouts_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    job = make_job(tmp_path, {**RL, "updates_per_step": 2, "objective": "cispo", "balance_advantages": False})
    trainer = trainer_of(job)
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer, trainer.lr_scheduler = trainer.accelerator.prepare(trainer.optimizer, trainer.lr_scheduler)
    model, records, optim = load_causal_lm(job.inputs["init"]), trainer.train_dataset[:4], job.stage.optim
    answers = trainer._sample(trainer.model, records)
    trainer.training_step(trainer.model, records)

    rate = optim.learning_rate / max(optim.warmup_steps, 1)
    adam = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps, weight_decay=0.0
    )
    for update in range(2):  # prompts 0 and 2, then 1 and 3
        model.zero_grad()
        tokens = sum(len(answer.token_ids) for of in answers[update::2] for answer in of)
        for of in answers[update::2]:
            rewards = torch.tensor([b.total for b in ByText().score([Sample([], a.text, {}) for a in of])], dtype=torch.float64)
            for answer, advantage in zip(of, (rewards - rewards.mean()).tolist(), strict=True):
                ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
                logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                new, old = logprobs[len(answer.prompt_ids) - 1 :], torch.tensor(answer.logprobs)
                weight = (new - old).exp().detach().clamp(max=5.0)
                (-(weight * advantage * new).sum() / tokens).backward()
        if update == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
            adam.step()
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    pairs = dict(trainer.model.named_parameters())
    # AdamW's first step moves every weight by the rate whatever the gradient's size, so a gradient of rounding noise moves it
    # either way; where the gradient stands out of the noise the weights agree, and the next gradient agrees everywhere.
    for name, parameter in model.named_parameters():
        assert (parameter.grad - pairs[name].grad).abs().max() < 1e-3 * largest, name
    moved = load_causal_lm(job.inputs["init"]).state_dict()
    assert any((pairs[name] - weight).abs().max() > 0.5 * rate for name, weight in moved.items())


def test_shares_of_updates_agree_between_one_rank_and_two(tmp_path: Path) -> None:
    trainer = trainer_of(make_job(tmp_path, {**RL, "steps": 2, "prompts_per_step": 8, "updates_per_step": 2}))
    whole, half = trainer._parts(32), trainer._parts(16)
    assert sorted(whole[0] + whole[1]) == list(range(32))
    for update in range(2):
        assert half[update] + [16 + i for i in half[update]] == whole[update]


def test_a_step_without_any_difference_in_reward_leaves_the_gradient_at_zero(tmp_path: Path) -> None:
    job = make_job(tmp_path, {**RL, "reward": {"model": None}})
    run.train(job, job.inputs["model"])
    assert set(values(job, "grad_norm")) == {0.0}
    assert differing(job.inputs["init"], job.inputs["model"]) == []


def test_shuffled_rewards_keep_their_mean_and_lose_their_order(tmp_path: Path) -> None:
    job = make_job(tmp_path, RL)
    control = make_job(tmp_path, {**RL, "shuffle_rewards": True})
    credits: list[Any] = []
    for one in (job, control):
        trainer = trainer_of(one)
        answers = [answer for of in trainer._sample(trainer.model, trainer.train_dataset[:4]) for answer in of]
        breakdowns = ByText().score([Sample([], answer.text, {}) for answer in answers])
        credits.append((trainer._credit(answers, breakdowns), trainer._notes["reward"]))
    (weights, advantages), noted = credits[0]
    (control_weights, control_advantages), control_noted = credits[1]
    assert noted == control_noted and weights == control_weights
    rewards = [breakdown.total for breakdown in breakdowns]
    moved = shuffled_rewards(rewards, control.config.seed, 0)
    mass = torch.tensor(weights, dtype=torch.float64) * torch.tensor([len(answer.token_ids) for answer in answers])
    for found, of in ((advantages, rewards), (control_advantages, moved)):
        credit = group_advantages(torch.tensor(of, dtype=torch.float64), 4, False)
        assert found == balance(credit, mass).tolist()
    assert advantages != control_advantages


def test_dropped_samples_take_no_part_in_their_group(tmp_path: Path) -> None:
    trainer = trainer_of(make_job(tmp_path, {**RL, "balance_advantages": False}))
    answers = [answer for of in trainer._sample(trainer.model, trainer.train_dataset[:4]) for answer in of]
    totals = [0.0, 1.0, 0.5, 0.25] * 4
    gone = {1, 4, 5, 6, 7}
    breakdowns = [
        RewardBreakdown(total, (LevelScore("correctness", 0.0, 1.0, 0.0), LevelScore("rest", total, 1.0, total)), index in gone)
        for index, total in enumerate(totals)
    ]
    weights, advantages = trainer._credit(answers, breakdowns)
    lengths = [len(answer.token_ids) for answer in answers]
    kept = [index for index in range(16) if index not in gone]
    assert weights == [0.0 if index in gone else 1 / sum(lengths[i] for i in kept) for index in range(16)]
    assert advantages[:4] == [-0.25, 0.0, 0.25, 0.0], "the mean of 0, 0.5 and 0.25 is 0.25"
    assert advantages[4:8] == [0.0] * 4
    assert advantages[8:12] == advantages[12:] == [-0.4375, 0.5625, 0.0625, -0.1875]
    noted = {name: values[-1] for name, values in trainer._notes.items()}
    assert noted == {
        "reward": 4.25 / 11, "reward/correctness": 0.0, "reward/rest": 4.25 / 11, "dropped": 5.0, "alarm": 0.0,
        "answer_length": sum(lengths[i] for i in kept) / 11,
    }, "nothing was verified, so there is no accuracy"  # fmt: skip
    control = trainer_of(make_job(tmp_path, {**RL, "balance_advantages": False, "shuffle_rewards": True}))
    _, moved = control._credit(answers, breakdowns)
    assert sum(value == 0 for value in moved) >= 5, "shuffled with its reward, a dropped sample stays dropped"


class NoVerdict(ByText):
    """Drops every answer."""

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        return [replace(breakdown, dropped=True) for breakdown in super().score(samples)]


def test_dropped_samples_do_not_train_through_the_kl_term_either(tmp_path: Path) -> None:
    trainer = trainer_of(make_job(tmp_path, {**RL, "kl_coef": 0.5, "objective": "grpo"}), reference=True)
    trainer.create_optimizer_and_scheduler(4)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.5)  # away from the reference

    def largest() -> float:
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, trainer.train_dataset[:4])
        return max(float(p.grad.abs().max()) for p in trainer.model.parameters() if p.grad is not None)

    assert largest() > 1e-4
    trainer.reward = NoVerdict()
    assert largest() == 0.0
    assert trainer._notes["dropped"] == [0.0, 16.0] and trainer._notes["reward"][1] > 0, "all are dropped, so all are told of"


def test_drift_is_told_in_metrics_and_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(make_job(tmp_path, RL))
    trainer.drift = DriftMonitor(window=2)
    for step in range(4):
        trainer._note_step([ScoredAnswer(0.5, False, False, None, {}, 10 * (step // 2 + 1), 4)])
    assert trainer._notes["alarm"] == [0, 0, 0, 1] and trainer._notes["alarm/length"] == [1]
    assert "answers grow (10 to 20 between two windows of 2 steps) while verified accuracy does not" in caplog.text


def test_a_resumed_stage_keeps_its_reward_model(tmp_path: Path) -> None:
    job = make_job(tmp_path, {**RL, "steps": 2})
    run.train(job, job.inputs["model"])
    note = read_json(job.folder / "reward.json")
    assert note["model"] == folder_hash(job.inputs["reward"]) and note["section"]["learned_weight"] == 0.4
    assert any(job.checkpoints.iterdir())
    run.train(job, job.inputs["model"])  # goes on from its last checkpoint, with the same model
    make_judge(job.inputs["init"], job.inputs["reward"], seed=4)
    with pytest.raises(UserError, match="reward.json: the stage began with reward model .* remove the stage's checkpoints"):
        run.train(job, job.inputs["model"])


def test_shuffling_rewards_permutes_them_over_the_whole_step_anew_at_every_step() -> None:
    rewards = [float(number) for number in range(32)]
    first = shuffled_rewards(rewards, 0, 0)
    assert sorted(first) == rewards and first == shuffled_rewards(rewards, 0, 0)
    assert len({tuple(shuffled_rewards(rewards, seed, step)) for seed in (0, 1) for step in (0, 1)} | {tuple(rewards)}) == 5
    groups = {value // 4 for value in first[:4]}
    assert len(groups) > 1, "samples leave their prompt's group"


def test_metrics_of_a_run(tmp_path: Path) -> None:
    job = make_job(tmp_path, {**RL, "kl_coef": 0.1, "objective": "grpo"})
    run.train(job, job.inputs["model"])
    assert all(0 < value < 0.4 for value in values(job, "reward")) and len(values(job, "reward")) == 4
    assert values(job, "accuracy") == [0.0] * 4
    assert len(values(job, "train_seconds")) == 1 and values(job, "train_tokens")[0] > 0
    assert all(value > 0 for value in values(job, "tokens_per_second"))


class ShareOfDigits(ByText):
    """A reward that is quickly learned: the share of digits among the characters."""

    def score(self, samples: Sequence[Sample]) -> list[RewardBreakdown]:
        return [self._one(sum(c.isdigit() for c in sample.answer) / max(len(sample.answer), 1)) for sample in samples]


@pytest.mark.parametrize("objective", ["minimax01", "grpo", "cispo"])
def test_reward_rises_and_stays_where_rewards_are_shuffled(tmp_path: Path, objective: str) -> None:
    sampling = {"samples_per_prompt": 64, "max_new_tokens": 3}
    stage = {**RL, "steps": 24, "prompts_per_step": 1, "sampling": sampling, "objective": objective}
    stage |= {"optim": {"learning_rate": 2e-2, "schedule": "constant"}}
    for shuffled in (False, True):
        job = make_job(tmp_path / str(shuffled), {**stage, "shuffle_rewards": shuffled})
        trainer = trainer_of(job)
        trainer.reward = ShareOfDigits()
        trainer.run()
        rewards = values(job, "reward")
        assert rewards[0] < 0.1
        assert rewards[-1] < 0.2 if shuffled else rewards[-1] > 0.5, rewards


def test_micro_batches_hold_every_sample_once_and_mask_answers_alone() -> None:
    answers = [Answer((1, 2, 3), tuple(range(5, 5 + n)), (-0.5,) * n, "", True, 1.0 if n % 2 else 0.5) for n in range(1, 8)]
    batches = micro_batches(answers, [0.1] * 7, [float(n) for n in range(7)], [0, 1, 3, 4, 6], budget=12)
    assert sum(len(batch.lengths) for batch in batches) == 5
    assert sum(int(batch.mask.sum()) for batch in batches) == 1 + 2 + 4 + 5 + 7
    for batch in batches:
        assert ((batch.tokens[0] >= 5) == (batch.mask > 0)).all() and (batch.weights > 0).equal(batch.mask > 0)
        assert batch.old_logprobs.equal(-0.5 * batch.mask)
