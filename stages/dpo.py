"""Direct preference optimisation on packed pairs.

Built on transformers' `Trainer`: TRL 1.16's DPOTrainer replaces the model's forward by its own head and forces
`padding_free=False`, so a subclass would have to undo rather than add. Formats and the names `beta`, `chosen` and
`rejected` are TRL's.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from posttrain.stages.packed_trainer import PackedTrainer
from posttrain.stages.packs import Group, PackCollator, PackedDataset, document_sums, layout_of, plan_packs

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


@dataclass(frozen=True)
class Reference:
    """What the model before training says of the stage's pairs.

    Attributes:
        logprobs: fp32 [groups, 2], log-probabilities of both answers of every group; zero for groups in no pack.
        seconds: wall time that computing them took.
    """

    logprobs: torch.Tensor
    seconds: float


class DPOStageTrainer(PackedTrainer):
    """Mean of `dpo_losses` over the step's pairs, plus `sft_weight` times the chosen answers' mean loss per token."""

    section: DPOStage

    def __init__(
        self,
        job: StageJob,
        model: MiniMaxText01ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        dataset: PackedDataset,
        reference: Reference,
    ) -> None:
        """Train `model` in place.

        Args:
            job, model, tokenizer: as in `StageTrainer`.
            dataset: groups are pairs (chosen, rejected).
            reference: of the model before training; what it took counts into the stage's time.
        """
        self.reference = reference.logprobs
        self._margins: list[torch.Tensor] = []
        super().__init__(job, model, tokenizer, dataset)
        self.prepare_seconds += reference.seconds

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
        self._margins.append(((chosen - reference[:, 0]) - (rejected - reference[:, 1])).detach())
        loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As in `PackedTrainer`; notes what the step's pairs say."""
        self._margins.clear()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._note_margins(torch.cat(self._margins))
        return loss

    def _note_margins(self, margins: torch.Tensor) -> None:
        sums = torch.stack([(margins > 0).sum().to(margins), margins.sum(), torch.tensor(len(margins)).to(margins)])
        right, total, count = group.total(sums).tolist()
        self.note("accuracy", right / count)
        self.note("margin", self.section.beta * total / count)


def dpo_dataset(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> PackedDataset:
    """Packs of the stage's prepared pairs; both documents of a pair lie in the same pack."""
    sources: dict[str, list[Group]] = {ref: [] for ref in job.stage.data}
    for record in read_records(job.inputs["data"] / "records.jsonl"):
        sources[record["source"]].append(Group(encode_pair(tokenizer, record)))
    return plan_packs(sources, job.stage, job.config.seed)


def reference_logprobs(model: MiniMaxText01ForCausalLM, dataset: PackedDataset, cache: Path) -> Reference:
    """Log-probabilities of both answers of every group that lies in a pack, under `model`.

    Read from `cache` where that was made from the same weights and the same groups; else computed, each rank its share, and
    written there. So no second model is in memory while the first one trains.
    """
    used = sorted({index for members in dataset.packs for index in members})
    key = _digest(model, dataset.groups, used) if group.rank() == 0 else ""
    known: Reference | None = group.broadcast(_read_cache(cache, key) if group.rank() == 0 else None)
    if known is not None:
        return known
    started = time.monotonic()
    collator = PackCollator(dataset.groups)
    device = default_device()
    model = placed(model).eval()
    values = torch.zeros(len(dataset.groups), 2, device=device)
    with torch.no_grad():
        for index in used[group.rank() :: group.world_size()]:
            batch = collator([[index]])
            output = model(batch["input_ids"].to(device), layout=layout_of(batch), return_token_logprobs=True)
            values[index] = document_sums(output.token_logprobs * (batch["labels"] != IGNORE).to(device), layout_of(batch))
    values = group.total(values).cpu()
    seconds = group.broadcast(time.monotonic() - started)
    if group.rank() == 0:
        metadata = {"key": key, "seconds": repr(seconds)}
        replace_file(cache, lambda path: save_file({"logprobs": values}, path, metadata=metadata))
    return Reference(values, seconds)


def train_dpo(job: StageJob, folder: Path) -> None:
    """Train the stage and write its model into `folder`."""
    tokenizer = load_tokenizer(job.inputs["init"])
    model = load_causal_lm(job.inputs["init"])
    dataset = dpo_dataset(job, tokenizer)
    reference = reference_logprobs(model, dataset, job.folder / "reference.safetensors")
    trainer = DPOStageTrainer(job, model, tokenizer, dataset, reference)
    trainer.run()
    trainer.save_final(folder)


def _read_cache(cache: Path, key: str) -> Reference | None:
    if not cache.exists():
        return None
    try:
        with safe_open(cache, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") == key:
                return Reference(file.get_tensor("logprobs"), float(metadata["seconds"]))
    except SafetensorError as error:
        logger.warning("%s: damaged (%s); computing it again", cache, error)
    return None


def _digest(model: nn.Module, groups: Sequence[Group], used: Sequence[int]) -> str:
    """Hash of all that the log-probabilities depend on: weights, and the groups computed with their places."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(str(len(groups)).encode())
    for index in used:
        for document in groups[index].documents:
            digest.update(str((index, document.input_ids, document.labels)).encode())
    return digest.hexdigest()
