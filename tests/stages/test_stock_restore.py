"""Why the restore is ours: transformers' own leaves the experts of its MiniMax at their initial values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import MiniMaxConfig, MiniMaxForCausalLM, Trainer, TrainingArguments

from posttrain.stages import run
from tests.stages.crash import differing, train_and_crash
from tests.stages.tasks import SFT, make_job


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random documents with themselves as labels."""

    def __init__(self) -> None:
        self.rows = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def stock_trainer(folder: Path, steps: int) -> Trainer:
    torch.manual_seed(1)
    config = MiniMaxConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        layer_types=["linear_attention", "full_attention"],
        max_position_embeddings=64,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=MiniMaxForCausalLM(config), args=arguments, train_dataset=Tokens())


def test_stock_restore_leaves_experts_and_routers_at_their_initial_values(tmp_path: Path) -> None:
    first = stock_trainer(tmp_path, steps=2)
    initial = {name: value.clone() for name, value in first.model.state_dict().items()}
    first.train()
    trained = first.model.state_dict()
    second = stock_trainer(tmp_path, steps=2)
    second._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    restored = second.model.state_dict()
    lost = [name for name in trained if restored[name].equal(initial[name]) and not trained[name].equal(initial[name])]
    assert lost and all(".mlp." in name for name in lost), lost
    assert any("experts" in name for name in lost)


def test_our_restore_brings_every_tensor_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, SFT)
    train_and_crash(job, job.inputs["model"], step=3)
    checkpoint = job.checkpoints / "checkpoint-2"
    trained = differing(checkpoint, job.inputs["init"])
    assert any("experts" in name for name in trained) and any("gate" in name for name in trained)

    seen: dict[str, torch.Tensor] = {}

    def look_at_first(self: object, model: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        seen.update({name: value.clone() for name, value in model.state_dict().items()})
        raise KeyboardInterrupt

    from posttrain.stages.sft import SFTStageTrainer
    from tests.stages.crash import weights

    monkeypatch.setattr(SFTStageTrainer, "training_step", look_at_first)
    with pytest.raises(KeyboardInterrupt):
        run.train(job, job.inputs["model"])
    saved = weights(checkpoint)
    assert seen.keys() == saved.keys()
    assert [name for name in seen if not seen[name].equal(saved[name])] == []
