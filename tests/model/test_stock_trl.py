"""TRL's own trainers, unmodified, on our model; transformers' MiniMax in the same test shows what the test would catch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from posttrain.data.tokenizer import train_tokenizer
from posttrain.model.modeling import MiniMaxText01ForCausalLM, MiniMaxText01ForSequenceClassification
from posttrain.model.router import paper_balance_loss, transformers_balance_loss
from tests.model.native import native_model
from tests.model.small import random_tokens, small_config, small_model

LENGTHS = (17, 64, 3, 70, 9, 30)
VOCABULARY = 320
PAIRS = [
    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3 or 4"},
    {"prompt": "say a letter", "chosen": ": a, or b", "rejected": "!"},
]
# TRL's head returns fp32 whatever the model's type: one rounding of a loss near 6 is 2.4e-7.
TRL_HEAD = 1e-6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a b c 1 2 3", "say a letter"], 300)


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """What every trainer is given: nothing that touches the model."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-4,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def sft_trainer(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, **changes: Any) -> SFTTrainer:
    """One packed batch of documents of `LENGTHS`, out of order as TRL packs them."""
    changes = {"per_device_train_batch_size": 1, "router_aux_loss_coef": 0.0, **changes}
    documents = [{"input_ids": random_tokens(length, VOCABULARY).tolist()} for length in LENGTHS]
    arguments = SFTConfig(packing=True, max_length=sum(LENGTHS), **options(folder, **changes))
    return SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(documents), processing_class=tokenizer)


def first_batch(trainer: Any) -> dict[str, Any]:
    return dict(next(iter(trainer.get_train_dataloader())))


def split(batch: dict[str, Any]) -> list[torch.Tensor]:
    """The documents of a packed batch, [1, length] each."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [batch["input_ids"][:, a:b] for a, b in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True)]


def leak(trainer: SFTTrainer) -> tuple[float, float]:
    """How far the loss of a pack, and its gradient, are from those of the same documents alone.

    Returns:
        The difference of losses, and the largest difference of a gradient's entry as a share of the largest entry.
    """
    model, batch = trainer.model, first_batch(trainer)
    documents = split(batch)
    assert sorted(d.shape[1] for d in documents) == sorted(LENGTHS)
    model.zero_grad()
    packed = trainer.compute_loss(model, batch)
    packed.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    targets = sum(LENGTHS) - len(LENGTHS)
    sums = [F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum") for ids in documents]
    alone = torch.stack(sums).sum() / targets
    alone.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return abs(packed.item() - alone.item()), float((gradient - expected).abs().max() / expected.abs().max())


def test_stock_sft_on_packs_does_not_leak_between_documents(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trainer = sft_trainer(small_model(vocab_size=VOCABULARY, dtype=torch.float64), tokenizer, tmp_path)
    loss, gradient = leak(trainer)
    assert loss < TRL_HEAD and gradient < TRL_HEAD
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.lm_head.weight)


def test_the_same_test_finds_the_leak_of_transformers_model(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Its lightning layers carry the state of one document into the next."""
    native = native_model(small_model(vocab_size=VOCABULARY, dtype=torch.float64))
    loss, gradient = leak(sft_trainer(native, tokenizer, tmp_path))
    assert loss > 0.01 and gradient > 0.01


@pytest.mark.parametrize("attention_mask", [False, True])
def test_stock_sft_adds_the_auxiliary_loss_in_transformers_form(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, attention_mask: bool
) -> None:
    """TRL weighs its own computation from the router's logits; it reads `num_experts` off the configuration."""
    model = small_model(vocab_size=VOCABULARY, dtype=torch.float64, output_router_logits=False, router_aux_loss_coef=0.3)
    padded = {"packing": False, "per_device_train_batch_size": 3}
    trainer = sft_trainer(model, tokenizer, tmp_path, router_aux_loss_coef=0.3)
    if attention_mask:
        arguments = SFTConfig(**options(tmp_path, **padded, router_aux_loss_coef=0.3, max_length=None))
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=trainer.train_dataset, processing_class=tokenizer)
    batch = first_batch(trainer)
    assert ("attention_mask" in batch) == attention_mask
    loss = trainer.compute_loss(model, dict(batch))
    ours = model.eval()(**batch, output_router_load=True)
    assert loss.item() == pytest.approx(ours.loss.item(), abs=TRL_HEAD)
    torch.testing.assert_close(ours.aux_loss, transformers_balance_loss(ours.router_load))
    plain = model(**batch, output_router_logits=False)
    assert plain.aux_loss is None
    torch.testing.assert_close(ours.loss - plain.loss, 0.3 * ours.aux_loss)
    assert float(ours.aux_loss.detach() / paper_balance_loss(ours.router_load).detach()) == pytest.approx(4**2, rel=0.2)


def test_stock_dpo_gives_the_loss_of_our_own_log_probabilities(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = small_model(vocab_size=VOCABULARY, dtype=torch.float64)
    reference = small_model(seed=1, vocab_size=VOCABULARY, dtype=torch.float64)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(beta=0.3, router_aux_loss_coef=0.0, **options(tmp_path)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    batch = first_batch(trainer)
    loss = trainer.compute_loss(model, dict(batch))

    def answers(scored: MiniMaxText01ForCausalLM) -> torch.Tensor:
        """Log-probability of every answer of the batch, read without padding."""
        sums = []
        for ids, mask, completion in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
            real = ids[mask.bool()][None]
            logprobs = scored(real, return_token_logprobs=True).token_logprobs
            sums.append((logprobs * completion[mask.bool()]).sum())
        return torch.stack(sums)

    better, worse = (answers(model) - answers(reference)).chunk(2)
    torch.testing.assert_close(loss.double(), -F.logsigmoid(0.3 * (better - worse)).mean(), rtol=0, atol=1e-5)
    trainer.train()


def test_stock_reward_training_gives_the_loss_of_our_own_scores(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The padding token stands inside a text too, and at its end."""
    torch.manual_seed(0)
    model = MiniMaxText01ForSequenceClassification(small_config(vocab_size=VOCABULARY, num_labels=1)).double()
    pad = tokenizer.pad_token_id
    pairs = [
        {"chosen_ids": [5, 6, pad, 7], "rejected_ids": [5, 6]},
        {"chosen_ids": [8, 9], "rejected_ids": [8, 10, 11, 12, pad, pad]},
    ]
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(max_length=None, **options(tmp_path)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    batch = first_batch(trainer)
    loss = trainer.compute_loss(model, dict(batch))
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(rows) == sorted(ids for pair in pairs for ids in pair.values())
    better, worse = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows]).chunk(2)
    torch.testing.assert_close(loss, -F.logsigmoid(better - worse).mean(), rtol=0, atol=1e-12)
    trainer.train()


def test_lora_on_attention_projections_trains_alone(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; it comes with the development tools")
    model = small_model(vocab_size=VOCABULARY)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = ["qkv_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    trainer = sft_trainer(adapted, tokenizer, tmp_path)
    trained = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    trainer.train()
    for name, before in trained.items():
        assert not torch.equal(before, adapted.get_parameter(name)), name
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if "lora" not in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
