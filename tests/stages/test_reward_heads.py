"""Training a reward model of several heads: what it learns, what it leaves alone, and that it can be stopped and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from posttrain.config.errors import UserError
from posttrain.config.reward_schema import DifficultySection
from posttrain.config.schema import RewardStage
from posttrain.data.encode import encode_pair
from posttrain.data.formats import normalise
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_reward_model
from posttrain.reward.curriculum import disagreement_of, pair_difficulty
from posttrain.reward.heads import Heads
from posttrain.reward.learned import LearnedLevel
from posttrain.stages import reward, reward_dataset, run
from posttrain.stages.files import read_json, read_records
from posttrain.stages.job import StageJob
from posttrain.stages.metrics import read_metrics
from posttrain.stages.reward import spread_members
from posttrain.stages.reward_dataset import answer_sample, member_leads
from posttrain.stages.reward_trainer import HeadsTrainer, RewardStageTrainer
from tests.stages.crash import differing, train_and_crash, weights
from tests.stages.reward_tasks import HELD, STAGE, TRAINED, TWO, grades, pairs, reward_job
from tests.stages.tasks import REWARD, make_job

LEARNING = {**STAGE, "steps": 100, "save_steps": 100, "pack_length": 512, "optim": {"learning_rate": 6e-3, "warmup_steps": 5}}
MIXED = {
    "pairs": pairs(TRAINED),
    "grades": grades(TRAINED),
    "held_pairs": pairs(HELD),
    "held_grades": grades(HELD),
}
BOTH = {
    **STAGE,
    "data": {"pairs": 1.0, "grades": 1.0},
    "heldout": {"held_pairs": 1.0, "held_grades": 1.0},
    "heldout_pairs": 30,
}


def trained(folder: Path, stage: dict[str, Any], **kwargs: Any) -> StageJob:
    job = reward_job(folder, stage, **kwargs)
    run.train(job, job.inputs["model"])
    return job


def names(job: StageJob) -> set[str]:
    return {record["name"] for record in read_metrics(job.metrics_path)}


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> StageJob:
    return trained(tmp_path_factory.mktemp("ensemble"), {**LEARNING, "ensemble": 8})


def test_two_dimensions_are_learned_and_ties_stay_equal(ensemble: StageJob, tmp_path: Path) -> None:
    run.evaluate(ensemble, tmp_path)
    result = read_json(tmp_path / "eval.json")
    found = result["reward"]
    assert found["targets"] == TWO and result["pair_accuracy"] == found["pair_accuracy"]["all"] > 0.95
    for target, other in (TWO, TWO[::-1]):
        assert found["pair_accuracy"]["by_target"][target]["accuracy"] > 0.95
        assert found["leakage"][target][target]["mean_lead"] > 2
        assert found["ties"][other]["mean_lead"] < 0.2
    assert len(read_records(tmp_path / "pairs.jsonl")) == 20
    assert {"accuracy/bridging", "loss/pairs", "loss/ties", "loss/centring"} <= names(ensemble)


def test_members_agree_about_what_they_saw_more_than_about_what_they_did_not(ensemble: StageJob) -> None:
    folder = ensemble.inputs["model"]
    level = LearnedLevel(load_reward_model(folder), load_tokenizer(folder))
    seen = [normalise(record) for record in pairs(HELD[::2])]
    texts = [("12", "7"), ("maybe", "perhaps"), ("1+1=2", "q")]
    unseen = [
        {**record, **normalise({"prompt": "?", "chosen": a, "rejected": b}), "prompt": record["prompt"]}
        for record in seen
        for a, b in texts
    ]
    known, unknown = (mean(disagreement_of(member_leads(level, group))) for group in (seen, unseen))
    assert unknown > 3 * known > 0


def test_stock_transformers_load_the_folder_and_it_says_what_it_scores(ensemble: StageJob) -> None:
    folder = ensemble.inputs["model"]
    heads = Heads(tuple(TWO), 8)
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    assert stock.config.num_labels == 16 and Heads.from_config(stock.config) == heads
    assert stock.config.id2label[3] == "correctness/3" and stock.config.label2id["style/7"] == 15
    tokenizer = load_tokenizer(folder)
    record = normalise(pairs(HELD)[0])
    chosen, _ = encode_pair(tokenizer, record)
    with torch.no_grad():
        logits = stock(input_ids=torch.tensor([chosen.input_ids])).logits[0].view(2, 8)
    (ours,) = LearnedLevel(load_reward_model(folder), tokenizer).dimension_scores([answer_sample(record, "chosen")])
    assert [ours[target].mean for target in TWO] == pytest.approx(logits.mean(dim=1).tolist(), abs=1e-5)
    assert [ours[target].std for target in TWO] == pytest.approx(logits.std(dim=1).tolist(), abs=1e-5)


def test_graded_answers_are_learned_with_pairs_in_one_batch(tmp_path: Path) -> None:
    job = trained(
        tmp_path, {**BOTH, **{name: LEARNING[name] for name in ("steps", "save_steps", "pack_length", "optim")}}, files=MIXED
    )
    assert {"loss/pairs", "loss/grades"} <= names(job)
    run.evaluate(job, tmp_path / "eval")
    found = read_json(tmp_path / "eval" / "eval.json")["reward"]["grades"]
    assert set(found) == set(TWO) and all(part["count"] == 15 and part["pearson"] > 0.9 for part in found.values())


@pytest.mark.parametrize("curriculum", [None, {"pacing": "phases"}], ids=["mixture", "curriculum"])
def test_a_resumed_stage_of_several_heads_ends_with_the_same_bits(tmp_path: Path, curriculum: dict[str, Any] | None) -> None:
    stage = {**BOTH, "ensemble": 3, "label_noise": 0.1, "margin_scale": 1.0, "curriculum": curriculum}
    whole = trained(tmp_path / "whole", stage, files=MIXED)
    broken = reward_job(tmp_path / "broken", stage, files=MIXED)
    train_and_crash(broken, broken.inputs["model"], step=3)
    run.train(broken, broken.inputs["model"])
    assert differing(whole.inputs["model"], broken.inputs["model"]) == []
    assert differing(whole.checkpoints / "checkpoint-2", whole.inputs["model"]), "training changed nothing"
    assert any(name.startswith("mixture/") for name in names(whole)) == (curriculum is not None)


def test_scoring_held_out_pairs_meanwhile_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = trained(tmp_path / "watched", {**STAGE, "ensemble": 2})
    monkeypatch.setattr(reward.HeldoutAccuracy, "on_step_end", lambda *args, **kwargs: None)
    alone = trained(tmp_path / "alone", {**STAGE, "ensemble": 2})
    assert differing(watched.inputs["model"], alone.inputs["model"]) == []
    assert any(name.startswith("accuracy/") for name in names(watched) - names(alone))


def test_one_head_on_plain_pairs_trains_by_trl_s_loss_and_the_other_trainer_agrees(tmp_path: Path) -> None:
    job = make_job(tmp_path, {**REWARD, "center_coefficient": 0.25})
    tokenizer = load_tokenizer(job.inputs["init"])
    items, per_step = reward_dataset.reward_dataset(job, tokenizer)
    assert items.column_names == ["chosen_ids", "rejected_ids"]
    rows = [items[index] for index in range(6)]
    labels = {"differs": [True], "equal": [False], "margins": [0.0], "graded": [False], "grades": [0.0], "weights": [1.0]}
    found = []
    for kind, extra in ((RewardStageTrainer, {}), (HeadsTrainer, labels)):
        model = load_reward_model(job.inputs["reward"])
        trainer = kind(job, model, tokenizer, items, per_step)
        loss = trainer.compute_loss(model, dict(trainer.data_collator([{**row, **extra} for row in rows])))
        loss.backward()
        found.append((float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (loss, gradients), (other, others) = found
    assert loss == pytest.approx(other, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_stage_of_one_head_is_named_and_costs_nothing_more(tmp_path: Path) -> None:
    job = make_job(tmp_path, REWARD)
    run.train(job, job.inputs["model"])
    assert read_json(job.inputs["model"] / "config.json")["id2label"] == {"0": "correctness"}
    assert not any("/" in name for name in names(job))


def test_heads_of_an_ensemble_differ_by_noise_whose_mean_is_zero(tmp_path: Path) -> None:
    job = make_job(tmp_path, REWARD)
    heads = Heads(("correctness", "style"), 4)
    model = load_reward_model(job.inputs["init"], from_causal_lm=True, labels=heads.labels())
    assert not model.score.weight.any()
    spread_members(model, heads, 0)
    by_target = model.score.weight.detach().view(2, 4, 32)
    assert by_target.mean(dim=1).abs().max() < 1e-7
    assert float(by_target.std()) == pytest.approx((3 / 4 / 32) ** 0.5, rel=0.2)
    first = by_target.clone()
    spread_members(model, heads, 1)
    assert not model.score.weight.detach().view(2, 4, 32).equal(first)


def test_a_second_stage_goes_on_from_the_heads_of_the_first_and_its_disagreement_orders_the_pairs(
    ensemble: StageJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Mapping[str, Any]] = []

    def watched(records: Sequence[Mapping[str, Any]], weights: DifficultySection) -> list[float]:
        seen.extend(records)
        return pair_difficulty(records, weights)

    monkeypatch.setattr(reward_dataset, "pair_difficulty", watched)
    job = second_stage(ensemble, {**STAGE, "ensemble": 8, "init": "first", "curriculum": {}})
    run.train(job, tmp_path / "model")
    assert len(seen) == 60 and all(0 < record["disagreement"] < 1 for record in seen)
    moved = (weights(tmp_path / "model")["score.weight"] - weights(ensemble.inputs["model"])["score.weight"]).abs().max()
    assert 0 < float(moved) < 4 * 1.01 * 3e-3, "four steps of Adam away from where the first stage ended"


def test_a_second_stage_of_other_heads_is_refused(ensemble: StageJob, tmp_path: Path) -> None:
    job = second_stage(ensemble, {**STAGE, "dimensions": ["style"], "ensemble": 8, "init": "first"})
    with pytest.raises(
        UserError, match="stages.stage.dimensions: 'first' has the heads correctness/0.* this stage asks for style/0"
    ):
        run.train(job, tmp_path / "model")


def test_a_second_stage_is_not_asked_for_answers(ensemble: StageJob, tmp_path: Path) -> None:
    job = second_stage(ensemble, {**STAGE, "ensemble": 8, "init": "first", "data": {"sums/test": 1.0}})
    with pytest.raises(
        UserError, match="stages.stage.init: prompts of sums/test have no pairs, and 'first' makes a reward model"
    ):
        run.prepare(job, tmp_path / "data")


def second_stage(first: StageJob, stage: dict[str, Any]) -> StageJob:
    """A stage on the data of `first` that starts from its model."""
    stages = {"first": first.stage, "stage": RewardStage.model_validate(stage)}
    config = first.config.model_copy(update={"stages": stages})
    folder = first.folder.parent / f"after-{len(stage['dimensions'])}"
    inputs = {**first.inputs, "init": first.inputs["model"]}
    return StageJob("stage", config, folder, inputs, folder / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_several_heads_of_two_workers_train_as_those_of_one_also_where_weights_are_sharded(tmp_path: Path) -> None:
    from tests.stages.test_workers import alone, curve, train

    stage = {
        **REWARD,
        "dimensions": TWO,
        "ensemble": 3,
        "label_noise": 0.1,
        "margin_scale": 0.5,
        "curriculum": {"adversarial": 0.2},
    }
    train(tmp_path / "two", stage, workers=2, zero_stage=3)
    alone(tmp_path / "one", stage)
    for name in ("loss", "loss/pairs", "loss/ties", "grad_norm", "margin", "mixture/contrastive"):
        assert curve(tmp_path / "two", name) == pytest.approx(curve(tmp_path / "one", name), rel=1e-3, abs=1e-4), name
