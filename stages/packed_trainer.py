"""What training on packs shares: one pack at a time, so that `batch_size` multiplies no activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.stages.job import StageJob
from posttrain.stages.packs import PackCollator, PackedDataset
from posttrain.stages.trainer import StageTrainer


class PackedTrainer(StageTrainer):
    """A rank's batch is a list of collated packs; `count_items` and `compute_loss` see one of them.

    Every pack's loss is divided by the counts of the whole step, so its size says nothing about its weight.
    """

    def __init__(
        self, job: StageJob, model: MiniMaxText01ForCausalLM, tokenizer: PreTrainedTokenizerBase, dataset: PackedDataset
    ) -> None:
        """Train `model` in place on `dataset`; see `StageTrainer` for errors."""
        collator = PackCollator(dataset.groups)
        super().__init__(
            job,
            model,
            tokenizer,
            dataset,
            job.stage.batch_size,
            data_collator=lambda packs: [collator([members]) for members in packs],
        )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Accumulate the gradient pack by pack; the loss, times the number of ranks, is returned."""
        packs: Sequence[Mapping[str, Any]] = self._prepare_inputs(inputs)
        return self.accumulate(
            model, [partial(self.compute_loss, model, pack, num_items_in_batch=num_items_in_batch) for pack in packs]
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        return super()._get_num_items_in_batch([pack for batch in batch_samples for pack in batch], device)
