"""Direct preference optimisation on packed pairs.

Built on transformers' `Trainer`: TRL 1.16's DPOTrainer replaces the model's forward by its own head and forces
`padding_free=False`, so a subclass would have to undo rather than add. Formats and the names `beta`, `chosen` and
`rejected` are TRL's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from posttrain.config.schema import DPOStage
from posttrain.data.encode import IGNORE, encode_pair
from posttrain.data.tokenizer import load_tokenizer
from posttrain.model.loading import load_causal_lm
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.stages import group
from posttrain.stages.devices import default_device, placed
from posttrain.stages.files import read_records, replace_file
from posttrain.stages.job import StageJob
from posttrain.stages.packs import Group, PackCollator, PackedDataset, document_sums, layout_of, plan_packs
from posttrain.stages.trainer import StageTrainer

logger = logging.getLogger(__name__)


def dpo_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float
) -> torch.Tensor:
    """-log sigmoid(beta ((log pi(c) - log ref(c)) - (log pi(r) - log ref(r)))), per pair.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: log-probabilities of whole answers, [pairs].
        beta: strength of the tie to the reference.

    Source: Rafailov et al. 2023, equation 7.
    """
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


class DPOStageTrainer(StageTrainer):
    """Mean of `dpo_losses` over the step's pairs, plus `sft_weight` times the chosen answers' mean loss per token."""

    section: DPOStage

    def __init__(
        self,
        job: StageJob,
        model: MiniMaxText01ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        dataset: PackedDataset,
        reference: torch.Tensor,
    ) -> None:
        """Train `model` in place.

        Args:
            job, model, tokenizer: as in `StageTrainer`.
            dataset: groups are pairs (chosen, rejected).
            reference: fp32 [groups, 2], log-probabilities of both answers under the model before training.
        """
        self.reference = reference
        collator = PackCollator(dataset.groups)
        super().__init__(job, model, tokenizer, dataset, job.stage.batch_size, data_collator=collator)

    def count_items(self, batch: dict[str, Any]) -> tuple[list[int], int]:
        """Pairs, and tokens of chosen answers; all tokens."""
        trained = (batch["labels"] != IGNORE).split(batch["lengths"])
        return [len(batch["groups"]), int(sum(part.sum() for part in trained[0::2]))], batch["input_ids"].numel()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The rank's share of the loss times the number of ranks, whose gradients are averaged."""
        assert isinstance(num_items_in_batch, torch.Tensor)
        pairs, chosen_tokens = num_items_in_batch
        outputs = model(inputs["input_ids"], layout=layout_of(inputs), return_token_logprobs=True)
        answers = document_sums(outputs.token_logprobs * (inputs["labels"] != IGNORE), layout_of(inputs))
        chosen, rejected = answers[0::2], answers[1::2]
        reference = self.reference[inputs["groups"]].to(answers)
        loss = dpo_losses(chosen, rejected, reference[:, 0], reference[:, 1], self.section.beta).sum() / pairs
        if self.section.sft_weight:
            loss = loss - self.section.sft_weight * chosen.sum() / chosen_tokens
        self._note_margins((chosen - reference[:, 0]) - (rejected - reference[:, 1]))
        loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _note_margins(self, margins: torch.Tensor) -> None:
        sums = torch.stack([(margins > 0).sum().to(margins), margins.sum(), torch.tensor(len(margins)).to(margins)])
        right, total, count = group.total(sums.detach()).tolist()
        self.note("accuracy", right / count)
        self.note("margin", self.section.beta * total / count)


def dpo_dataset(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> PackedDataset:
    """Packs of the stage's prepared pairs; both documents of a pair lie in the same pack."""
    sources: dict[str, list[Group]] = {ref: [] for ref in job.stage.data}
    for record in read_records(job.inputs["data"] / "records.jsonl"):
        sources[record["source"]].append(Group(encode_pair(tokenizer, record)))
    return plan_packs(sources, job.stage, job.config.seed)


def reference_logprobs(model: MiniMaxText01ForCausalLM, dataset: PackedDataset, cache: Path) -> torch.Tensor:
    """Log-probabilities of every group's two answers under `model`, fp32 [groups, 2]; zero for groups in no pack.

    Read from `cache` where it fits the dataset; else computed, each rank its share, and written there. So no second model
    is in memory while the first one trains.
    """
    key = _digest(dataset.groups)
    known = group.broadcast(_read_cache(cache, key) if group.rank() == 0 else None)
    if known is not None:
        return known
    collator = PackCollator(dataset.groups)
    device = default_device()
    model = placed(model).eval()
    values = torch.zeros(len(dataset.groups), 2, device=device)
    used = sorted({index for members in dataset.packs for index in members})
    with torch.no_grad():
        for index in used[group.rank() :: group.world_size()]:
            batch = collator([[index]])
            output = model(batch["input_ids"].to(device), layout=layout_of(batch), return_token_logprobs=True)
            values[index] = document_sums(output.token_logprobs * (batch["labels"] != IGNORE).to(device), layout_of(batch))
    values = group.total(values).cpu()
    if group.rank() == 0:
        replace_file(cache, lambda path: save_file({"logprobs": values}, path, metadata={"documents": key}))
    return values


def train_dpo(job: StageJob, folder: Path) -> None:
    """Train the stage and write its model into `folder`."""
    tokenizer = load_tokenizer(job.inputs["init"])
    model = load_causal_lm(job.inputs["init"])
    dataset = dpo_dataset(job, tokenizer)
    reference = reference_logprobs(model, dataset, job.folder / "reference.safetensors")
    trainer = DPOStageTrainer(job, model, tokenizer, dataset, reference)
    trainer.run()
    trainer.save_final(folder)


def _read_cache(cache: Path, key: str) -> torch.Tensor | None:
    if not cache.exists():
        return None
    try:
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("documents") == key:
                return file.get_tensor("logprobs")
    except SafetensorError as error:
        logger.warning("%s: damaged (%s); computing it again", cache, error)
    return None


def _digest(groups: Sequence[Group]) -> str:
    digest = hashlib.sha256()
    for pair in groups:
        for document in pair.documents:
            digest.update(str((document.input_ids, document.labels)).encode())
    return digest.hexdigest()
