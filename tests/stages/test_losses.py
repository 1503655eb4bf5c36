"""Losses as the trainers compute them, against the same loss worked out from logits of single documents."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from posttrain.data.encode import Document
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_causal_lm, load_reward_model
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.stages import dpo, run
from posttrain.stages.dpo import DPOStageTrainer, dpo_dataset, reference_logprobs
from posttrain.stages.metrics import read_metrics
from posttrain.stages.packs import Group, PackCollator, PackedDataset
from posttrain.stages.reward import RewardStageTrainer, reward_dataset
from posttrain.stages.sft import SFTStageTrainer, sft_dataset
from tests.stages.tasks import DPO, REWARD, SFT, make_job


def alone(model: MiniMaxText01ForCausalLM, document: Document) -> torch.Tensor:
    """Summed negative log-likelihood of a document's trained tokens, from logits, without packing."""
    logits = model(torch.tensor([document.input_ids])).logits[0]
    return F.cross_entropy(logits[:-1], torch.tensor(document.labels[1:]), ignore_index=-100, reduction="sum")


def larger_weights(model: MiniMaxText01ForCausalLM) -> MiniMaxText01ForCausalLM:
    """The same model with weights of order one, so that layers matter to the loss."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    return model


def first_record(path: Path, name: str) -> float:
    return next(record["value"] for record in read_metrics(path) if record["name"] == name)


def test_packed_documents_have_the_loss_of_each_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    tokenizer, model = load_tokenizer(job.inputs["init"]), larger_weights(load_causal_lm(job.inputs["init"]))
    dataset = sft_dataset(job, tokenizer)
    trainer = SFTStageTrainer(job, model, tokenizer, dataset)
    batch = PackCollator(dataset.groups)([dataset[0], dataset[1]])
    with torch.no_grad():
        _, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        trained = -(outputs.token_logprobs * (batch["labels"] != -100))
        packed = torch.stack([part.sum() for part in trained.split(batch["lengths"])])
        single = torch.stack([alone(model, dataset.groups[index].documents[0]) for index in batch["groups"]])
    assert len(packed) >= 6 and packed.min() > 0.1
    assert (packed - single).abs().max() < 1e-6 * max(1.0, float(single.max()))


def test_the_first_loss_of_sft_is_the_mean_over_trained_tokens(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    run.train(job, job.inputs["model"])
    tokenizer, model = load_tokenizer(job.inputs["init"]), load_causal_lm(job.inputs["init"])
    dataset = sft_dataset(job, tokenizer)
    documents = [dataset.groups[i].documents[0] for pack in dataset.packs[:2] for i in pack]
    tokens = sum(label != -100 for document in documents for label in document.labels[1:])
    with torch.no_grad():
        expected = sum(float(alone(model, document)) for document in documents) / tokens
    assert first_record(job.metrics_path, "loss") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_dpo_loss_on_packed_pairs_is_the_formula_on_single_documents(tmp_path: Path, sft_weight: float) -> None:
    job = make_job(tmp_path, {**DPO, "beta": 0.3, "sft_weight": sft_weight})
    tokenizer = load_tokenizer(job.inputs["init"])
    reference, policy = load_causal_lm(job.inputs["init"]), larger_weights(load_causal_lm(job.inputs["init"]))
    dataset = dpo_dataset(job, tokenizer)
    before = reference_logprobs(reference, dataset, tmp_path / "cache")
    trainer = DPOStageTrainer(job, policy, tokenizer, dataset, before)
    batch = PackCollator(dataset.groups)([dataset[0], dataset[1]])
    counts, tokens = trainer.count_items(batch)
    assert tokens == sum(batch["lengths"])
    with torch.no_grad():
        loss = trainer.compute_loss(policy, batch, num_items_in_batch=torch.tensor(counts))
        losses, chosen_nll, chosen_tokens = [], 0.0, 0
        for index in batch["groups"]:
            chosen, rejected = dataset.groups[index].documents
            margin = alone(reference, chosen) - alone(policy, chosen) - alone(reference, rejected) + alone(policy, rejected)
            losses.append(-F.logsigmoid(0.3 * margin))
            chosen_nll += float(alone(policy, chosen))
            chosen_tokens += sum(label != -100 for label in chosen.labels)
    assert counts == [len(losses), chosen_tokens]
    expected = float(torch.stack(losses).mean()) + sft_weight * chosen_nll / chosen_tokens
    assert abs(expected - 0.693) > 0.02
    assert float(loss) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stage", [SFT, DPO], ids=["sft", "dpo"])
def test_the_packs_of_a_step_pass_through_the_model_one_at_a_time_with_the_gradient_of_all(
    tmp_path: Path, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, {**stage, "batch_size": 3})
    tokenizer, model = load_tokenizer(job.inputs["init"]), larger_weights(load_causal_lm(job.inputs["init"]))
    trainer: SFTStageTrainer | DPOStageTrainer
    if stage is SFT:
        dataset = sft_dataset(job, tokenizer)
        trainer = SFTStageTrainer(job, model, tokenizer, dataset)
    else:
        dataset = dpo_dataset(job, tokenizer)
        before = reference_logprobs(load_causal_lm(job.inputs["init"]), dataset, tmp_path / "cache")
        trainer = DPOStageTrainer(job, model, tokenizer, dataset, before)
    together = PackCollator(dataset.groups)(dataset.packs[:3])
    items = torch.tensor(trainer.count_items(together)[0])
    expected = trainer.compute_loss(model, together, num_items_in_batch=items)
    expected.backward()
    expected = expected.detach()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    trainer.create_optimizer_and_scheduler(4)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].numel()))
    batch = trainer.data_collator(dataset.packs[:3])
    assert trainer._get_num_items_in_batch([batch], torch.device("cpu")).equal(items)
    loss = trainer.training_step(model, batch, items)
    assert len(seen) == 3 and max(seen) <= job.stage.pack_length and sum(seen) == together["input_ids"].numel()
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() < 1e-5 * largest, name


def test_both_answers_of_a_pair_lie_in_one_pack_and_packs_hold_what_they_may(tmp_path: Path) -> None:
    job = make_job(tmp_path, DPO)
    dataset = dpo_dataset(job, load_tokenizer(job.inputs["init"]))
    assert len(dataset) == job.stage.steps * job.stage.batch_size
    for members in dataset.packs:
        assert 0 < sum(len(dataset.groups[index]) for index in members) <= job.stage.pack_length


def test_reference_is_read_back_with_its_seconds_and_made_again_where_the_file_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path, DPO)
    dataset, model = dpo_dataset(job, load_tokenizer(job.inputs["init"])), load_causal_lm(job.inputs["init"])
    cache = tmp_path / "reference.safetensors"
    made = reference_logprobs(model, dataset, cache)
    written = cache.stat().st_mtime_ns
    again = reference_logprobs(load_causal_lm(job.inputs["init"]), dataset, cache)
    assert again.logprobs.equal(made.logprobs) and again.seconds == made.seconds > 0
    assert cache.stat().st_mtime_ns == written
    cache.write_bytes(b"\xff" * 100)
    assert reference_logprobs(model, dataset, cache).logprobs.equal(made.logprobs)
    assert "damaged" in caplog.text


def test_reference_of_other_weights_pairs_or_packs_is_not_read_back(tmp_path: Path) -> None:
    job = make_job(tmp_path, DPO)
    dataset, model = dpo_dataset(job, load_tokenizer(job.inputs["init"])), load_causal_lm(job.inputs["init"])
    first = sorted({index for members in dataset.packs[:1] for index in members})
    rest = sorted({index for members in dataset.packs[1:] for index in members} - set(first))
    cache = tmp_path / "reference.safetensors"
    few = reference_logprobs(model, PackedDataset(dataset.groups, dataset.packs[:1]), cache).logprobs
    assert few[first].ne(0).all() and few[rest].eq(0).all() and rest
    whole = reference_logprobs(model, dataset, cache).logprobs
    assert whole[first].equal(few[first]) and whole[rest].ne(0).all()
    other = reference_logprobs(larger_weights(load_causal_lm(job.inputs["init"])), dataset, cache).logprobs
    assert not other[first].isclose(whole[first]).any()
    dataset.groups[first[0]].documents[0].labels[-1] = -100
    assert not reference_logprobs(model, dataset, cache).logprobs[first[0]].equal(whole[first[0]])


def test_the_reference_pass_counts_into_the_time_of_the_stage_and_stays_counted_when_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, DPO)
    original = dpo.document_sums
    clock = {"ahead": 0.0}
    now = time.monotonic
    monkeypatch.setattr(dpo.time, "monotonic", lambda: now() + clock["ahead"])

    def slow(*arguments: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            clock["ahead"] += 100.0
        return original(*arguments)

    monkeypatch.setattr(dpo, "document_sums", slow)
    run.train(job, job.inputs["model"])
    taken, spent = first_record(job.metrics_path, "train_seconds"), clock["ahead"]
    assert taken > spent >= 100.0
    shutil.rmtree(job.checkpoints)
    run.train(job, job.inputs["model"])
    assert first_record(job.metrics_path, "train_seconds") > spent == clock["ahead"], "no second pass"


def test_the_reward_loss_is_bradley_terry_with_the_pull_to_zero(tmp_path: Path) -> None:
    job = make_job(tmp_path, {**REWARD, "center_coefficient": 0.25})
    tokenizer, model = load_tokenizer(job.inputs["init"]), load_reward_model(job.inputs["reward"])
    pairs, per_step = reward_dataset(job, tokenizer)
    trainer = RewardStageTrainer(job, model, tokenizer, pairs, per_step)
    rows = [pairs[index] for index in range(3)]
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(trainer.data_collator(rows)))
        chosen = torch.stack([model(torch.tensor([row["chosen_ids"]])).logits[0, 0] for row in rows])
        rejected = torch.stack([model(torch.tensor([row["rejected_ids"]])).logits[0, 0] for row in rows])
    expected = (-F.logsigmoid(chosen - rejected) + 0.25 * (chosen + rejected) ** 2).mean()
    assert (chosen - rejected).abs().min() > 1e-4
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)


def test_no_label_on_a_first_token_and_boundaries_kept(tmp_path: Path) -> None:
    job = make_job(tmp_path, SFT)
    dataset = sft_dataset(job, load_tokenizer(job.inputs["init"]))
    collated: dict[str, Any] = PackCollator(dataset.groups)(dataset.packs[:3])
    starts = [sum(collated["lengths"][:number]) for number in range(len(collated["lengths"]))]
    assert collated["labels"][starts].eq(-100).all()
    total = sum(collated["lengths"])
    assert collated["input_ids"].shape == (1, total) and collated["labels"].shape == (total,)


def test_a_documents_first_token_is_never_trained_on_even_where_it_has_a_label() -> None:
    groups = [Group((Document([5, 6], [5, 6]),)), Group((Document([7], [7]),))]
    batch = PackCollator(groups)([[0, 1]])
    assert batch["labels"].tolist() == [-100, 6, -100]
    assert batch["lengths"] == [2, 1]
