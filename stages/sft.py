"""Supervised fine-tuning on packed documents.

Built on transformers' `Trainer`: TRL 1.16's SFTTrainer replaces the model's forward by its own head (`add_fused_lm_head`)
and refuses an own collator together with packing, so a subclass would have to undo rather than add.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from posttrain.data.encode import IGNORE, encode_document
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_causal_lm
from posttrain.stages.files import read_records
from posttrain.stages.job import StageJob
from posttrain.stages.packed_trainer import PackedTrainer
from posttrain.stages.packs import Group, PackedDataset, layout_of, plan_packs


class SFTStageTrainer(PackedTrainer):
    """loss = -sum over trained tokens of log p(token | its document so far) / trained tokens of the step, over all ranks."""

    def count_items(self, batch: dict[str, Any]) -> tuple[list[int], int]:
        """Trained tokens; all tokens."""
        return [int((batch["labels"] != IGNORE).sum())], batch["input_ids"].numel()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The rank's share of the loss times the number of ranks, whose gradients are averaged."""
        outputs = model(inputs["input_ids"], layout=layout_of(inputs), return_token_logprobs=True)
        trained = inputs["labels"] != IGNORE
        items = num_items_in_batch[0] if isinstance(num_items_in_batch, torch.Tensor) else trained.sum()
        loss = -(outputs.token_logprobs * trained).sum() / items * self.args.world_size
        return (loss, outputs) if return_outputs else loss


def sft_dataset(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> PackedDataset:
    """Packs of the stage's prepared records."""
    sources: dict[str, list[Group]] = {ref: [] for ref in job.stage.data}
    for record in read_records(job.inputs["data"] / "records.jsonl"):
        sources[record["source"]].append(Group((encode_document(tokenizer, record),)))
    return plan_packs(sources, job.stage, job.config.seed)


def train_sft(job: StageJob, folder: Path) -> None:
    """Train the stage and write its model into `folder`."""
    tokenizer = load_tokenizer(job.inputs["init"])
    trainer = SFTStageTrainer(job, load_causal_lm(job.inputs["init"]), tokenizer, sft_dataset(job, tokenizer))
    trainer.run()
    trainer.save_final(folder)
