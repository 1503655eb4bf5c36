"""What all trainers of this project share, on top of transformers' `Trainer`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from posttrain.config.errors import UserError
from posttrain.config.schema import AnyStage
from posttrain.model.loading import load_weights, save_model
from posttrain.stages import checkpoints, group
from posttrain.stages.arguments import training_arguments
from posttrain.stages.files import read_json
from posttrain.stages.job import StageJob
from posttrain.stages.metrics import MetricsWriter
from posttrain.stages.schedule import learning_rate

GATE = "block_sparse_moe.gate.weight"
"""End of the name of a router gate, which checkpoints hold in fp32 whatever the other weights are in."""


class StageTrainer(Trainer):
    """Adds to transformers' Trainer, for a stage of a run:

    - checkpoints that count only when complete, own retention, fall-back past damaged ones (`checkpoints.py`);
    - a strict restore: stock `_load_from_checkpoint` loads with strict=False, so a tensor under another name keeps its
      initial value after one line of log;
    - items taken in the order of the dataset, each once, so that a resumed run meets exactly the rest;
    - a loss normalised over all ranks, so that N ranks compute what one would;
    - records in metrics.jsonl, and the stage's time limit.

    Subclasses give `count_items` and `compute_loss` (or `training_step`). The dataset holds exactly
    `steps * items_per_step` items.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        job: StageJob,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Any,
        items_per_step: int,
        **kwargs: Any,
    ) -> None:
        """Prepare training; `kwargs` go to the Trainer.

        Raises:
            UserError: the items of a step do not divide over the ranks, or bf16 weights without DeepSpeed.
        """
        self.job, self.tokenizer = job, tokenizer
        self.section: AnyStage = job.stage
        self._gates: dict[str, torch.Tensor] = {}
        self.metrics = MetricsWriter(job.metrics_path, job.name)
        self.trained_tokens = 0
        self.prepare_seconds = _prepare_seconds(job)
        self._earlier_seconds = 0.0
        self._started = time.monotonic()
        self._notes: dict[str, list[float]] = defaultdict(list)
        self._logged_at = (time.monotonic(), 0)
        arguments: TrainingArguments = kwargs.pop("args", None) or training_arguments(job, items_per_step)
        kwargs.setdefault("data_collator", list)
        recompute(model, self.section.gradient_checkpointing)
        super().__init__(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, **kwargs)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_TimeLimit(self))

    # What subclasses answer

    def count_items(self, batch: Any) -> tuple[list[int], int]:
        """Counts that the loss of a rank's batch is divided by once summed over the ranks, and the batch's tokens."""
        raise NotImplementedError

    # Running

    def run(self) -> None:
        """Train to the end, from the last complete checkpoint where there is one."""
        root = self.job.checkpoints
        found = group.broadcast(checkpoints.last_complete(root) if group.rank() == 0 else None)
        if found is not None:
            self._resume_counters(found)
        self._started = time.monotonic()
        self._logged_at = (self._started, self.trained_tokens)
        self.train(resume_from_checkpoint=str(found) if found else None)
        if group.rank() == 0:
            self.metrics.log(self.state.global_step, {"train_seconds": self.seconds(), "train_tokens": self.trained_tokens})

    def seconds(self) -> float:
        """Time of the stage so far: its preparation and its training, over all resumed parts."""
        return self.prepare_seconds + self.training_seconds()

    def training_seconds(self) -> float:
        """Time of training so far, over all resumed parts."""
        return self._earlier_seconds + time.monotonic() - self._started

    def save_final(self, folder: Path) -> None:
        """Write the model and its tokenizer; call on every rank."""
        self.save_model(str(folder), _internal_call=True)
        group.barrier()

    def note(self, name: str, value: float) -> None:
        """Record a value of this step; metrics.jsonl gets the mean over the steps since the last record."""
        self._notes[name].append(float(value))

    def _resume_counters(self, folder: Path) -> None:
        manifest = checkpoints.read_manifest(folder)
        own = (group.world_size(), self.job.config.resources.zero_stage)
        wrote = (manifest.world_size, manifest.zero_stage)
        if own != wrote and (own[1] or wrote[1]):
            raise UserError(
                f"checkpoint was written by {wrote[0]} workers at ZeRO stage {wrote[1]}, this run has {own[0]} at {own[1]}",
                where=str(folder),
                instead="use the same resources, or remove the checkpoint to start the stage again",
            )
        self._earlier_seconds, self.trained_tokens = manifest.seconds, manifest.tokens

    # Data order, counts, gradients, optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        counted = [self.count_items(batch) for batch in batch_samples]
        sums = [sum(column) for column in zip(*([*items, tokens] for items, tokens in counted), strict=True)]
        totals = group.total(torch.tensor(sums, dtype=torch.int64, device=device))
        self.trained_tokens += int(totals[-1])
        return totals[:-1]

    def accumulate(self, model: nn.Module, losses: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
        """Add up the gradients of losses, one computed after the other, and their sum; ranks exchange with the last one.

        Args:
            model: as the Trainer wrapped it.
            losses: compute the parts of the rank's loss, times the number of ranks; equally many on every rank.

        Returns:
            the sum, fp32 scalar without a graph.
        """
        parts = []
        for number, compute in enumerate(losses):
            last = number == len(losses) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                loss = compute()
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
            parts.append(loss.detach())
        return torch.stack(parts).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the Trainer's estimate is for dense models."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The stage's schedule; it counts the stage's steps whatever ends training earlier."""
        if self.lr_scheduler is None:  # type: ignore[has-type]
            optim, steps = self.section.optim, self.section.steps
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = LambdaLR(optimizer, lambda step: learning_rate(step, steps, optim) / optim.learning_rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = checkpoints.checkpoint_folder(self.job.checkpoints, self.state.global_step)
        if group.rank() == 0:
            checkpoints.clear(folder)
        group.barrier()
        super()._save_checkpoint(model, trial)
        group.barrier()
        if group.rank() == 0:
            stage, step = self.job.config.resources.zero_stage, self.state.global_step
            checkpoints.seal(folder, step, self.training_seconds(), self.trained_tokens, group.world_size(), stage)
            checkpoints.prune(folder.parent, self.section.keep_checkpoints, folder)
        group.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model and tokenizer; call on every rank."""
        self._gates = self._fp32_gates()
        super().save_model(output_dir, _internal_call)

    def _fp32_gates(self) -> dict[str, torch.Tensor]:
        """Router gates from DeepSpeed's master weights, where the module's own are in bf16; every rank takes part."""
        if not (self.is_deepspeed_enabled and self.args.bf16):
            return {}
        from deepspeed.utils import safe_get_full_fp32_param

        assert self.model is not None
        gates = {name: weight for name, weight in self.model.named_parameters() if name.endswith(GATE)}
        return {name: safe_get_full_fp32_param(weight).cpu() for name, weight in gates.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        assert isinstance(self.model, PreTrainedModel) and output_dir is not None
        if self._gates:
            state_dict = {**(self.model.state_dict() if state_dict is None else state_dict), **self._gates}
        save_model(self.model, self.tokenizer, output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        assert target is not None
        load_weights(target, resume_from_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL would write one into every checkpoint."""

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a record of the steps since the last one."""
        super().log(logs, start_time)
        if "loss" not in logs:
            return  # the Trainer's summary at the end
        now, tokens = time.monotonic(), self.trained_tokens
        values = {name: value for name, value in logs.items() if name not in ("epoch", "num_tokens")}
        values |= {name: sum(noted) / len(noted) for name, noted in self._notes.items()}
        values["tokens_per_second"] = (tokens - self._logged_at[1]) / max(now - self._logged_at[0], 1e-9)
        self._notes.clear()
        self._logged_at = (now, tokens)
        if group.rank() == 0:
            self.metrics.log(self.state.global_step, values)


def recompute(model: PreTrainedModel, what: str) -> None:
    """Set what of a model of ours the backward pass computes again: "none", "attention" or whole "block"s."""
    if what == "none":
        return
    model.checkpoint_policy = what
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class _TimeLimit(TrainerCallback):
    """Ends training when the stage has used its time; rank 0's clock decides for all."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the clock."""
        limit = self.trainer.job.time_limit
        if limit is not None and group.broadcast(self.trainer.seconds() >= limit):
            control.should_training_stop = True


def _prepare_seconds(job: StageJob) -> float:
    if "data" not in job.inputs:
        return 0.0
    return float(read_json(job.inputs["data"] / "stats.json").get("seconds", 0.0))
