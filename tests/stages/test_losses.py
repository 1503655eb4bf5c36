"""Losses as the trainers compute them, against the same loss worked out from logits of single documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from posttrain.data.encode import Document
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_causal_lm, load_reward_model
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.stages import run
from posttrain.stages.dpo import DPOStageTrainer, dpo_dataset, reference_logprobs
from posttrain.stages.metrics import read_metrics
from posttrain.stages.packs import PackCollator
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
    batch = trainer.data_collator([dataset[0], dataset[1]])
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
    trainer = DPOStageTrainer(job, policy, tokenizer, dataset, reference_logprobs(reference, dataset, tmp_path / "cache"))
    batch = trainer.data_collator([dataset[0], dataset[1]])
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


def test_both_answers_of_a_pair_lie_in_one_pack_and_packs_hold_what_they_may(tmp_path: Path) -> None:
    job = make_job(tmp_path, DPO)
    dataset = dpo_dataset(job, load_tokenizer(job.inputs["init"]))
    assert len(dataset) == job.stage.steps * job.stage.batch_size
    for members in dataset.packs:
        assert 0 < sum(len(dataset.groups[index]) for index in members) <= job.stage.pack_length


def test_reference_is_read_back_and_made_again_for_other_pairs_or_a_damaged_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path, DPO)
    dataset, model = dpo_dataset(job, load_tokenizer(job.inputs["init"])), load_causal_lm(job.inputs["init"])
    cache = tmp_path / "reference.safetensors"
    made = reference_logprobs(model, dataset, cache)
    other = larger_weights(load_causal_lm(job.inputs["init"]))
    assert reference_logprobs(other, dataset, cache).equal(made), "read from the file"
    cache.write_bytes(b"\xff" * 100)
    assert reference_logprobs(model, dataset, cache).equal(made)
    assert "damaged" in caplog.text
    dataset.groups[0].documents[0].labels[-1] = -100
    assert not reference_logprobs(other, dataset, cache).equal(made)


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
