"""The trainers of reward models: TRL's for one head on plain pairs, and a subclass of it for everything else.

TRL's `RewardTrainer` pads its batches; the model takes the padding out again, so no compute is spent on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from posttrain.config.schema import RewardStage
from posttrain.model.modeling import MiniMaxText01ForSequenceClassification
from posttrain.reward.heads import Heads
from posttrain.reward.learned import LearnedLevel
from posttrain.stages import group
from posttrain.stages.arguments import training_arguments
from posttrain.stages.job import StageJob
from posttrain.stages.reward_dataset import differing
from posttrain.stages.reward_evaluation import accuracy_by_bucket, difficulty_section, rank_pairs
from posttrain.stages.reward_losses import centring_loss, grade_loss, preference_loss, tie_loss
from posttrain.stages.trainer import StageTrainer

WATCHED_PAIRS = 200
"""Most held-out pairs that are scored while a stage trains."""

HELDOUT_POINTS = 10
"""How often over a stage held-out pairs are scored."""

LABELS = ("differs", "equal", "margins", "pair_weights", "graded", "grades", "answer_weights")
"""What `HeadCollator` adds to the model's inputs."""


class RewardStageTrainer(StageTrainer, RewardTrainer):
    """TRL's trainer with this project's checkpoints, order and metrics; the loss stays TRL's.

    Every rank has equally many pairs, so the mean of the ranks' means is the mean over the step.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        job: StageJob,
        model: MiniMaxText01ForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Dataset,
        pairs_per_step: int,
        **kwargs: Any,
    ) -> None:
        """Train `model` in place on `pairs`, in their order; `kwargs` go to the Trainer.

        Args:
            job, model, tokenizer: as for every trainer.
            pairs: columns `chosen_ids` and `rejected_ids`; with `bucket`, the buckets' shares become metrics.
            pairs_per_step: rows a step, over all ranks.
        """
        stage = job.stage
        assert isinstance(stage, RewardStage)
        arguments = training_arguments(
            job, pairs_per_step, RewardConfig, max_length=None, center_rewards_coefficient=stage.center_coefficient
        )
        kwargs.setdefault("data_collator", DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id))
        self._buckets: list[str | None] = pairs["bucket"][:] if "bucket" in pairs.column_names else []
        self._bucket_names = sorted({bucket for bucket in self._buckets if bucket is not None})
        self._per_step, self.reward_stage = pairs_per_step, stage
        super().__init__(job, model, tokenizer, pairs, pairs_per_step, args=arguments, **kwargs)

    def count_items(self, batch: Mapping[str, Any]) -> tuple[list[int], int]:
        """Nothing (the loss is a mean); tokens without padding."""
        return [], int(batch["attention_mask"].sum())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's step; notes the share of each bucket in the step's pairs."""
        start = self.state.global_step * self._per_step
        drawn = Counter(bucket for bucket in self._buckets[start : start + self._per_step] if bucket is not None)
        for bucket in self._bucket_names if drawn else ():
            self.note(f"mixture/{bucket}", drawn[bucket] / drawn.total())
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss


class HeadsTrainer(RewardStageTrainer):
    """Several heads, margins, ties, noisy labels and graded answers; only collation and loss differ from TRL's.

    The loss is the mean over the step's items, pairs and graded answers alike. A pair's is its preference loss, `tie_weight`
    times its tie loss and `center_coefficient` times its centring; an answer's is `grade_weight` times its grade loss.
    """

    def __init__(
        self,
        job: StageJob,
        model: MiniMaxText01ForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        items: Dataset,
        items_per_step: int,
    ) -> None:
        """Train `model` in place on `items`, as `posttrain.stages.reward_dataset` makes them, in their order."""
        self.heads = Heads.from_config(model.config)
        with _taken_for_scalar(model.config):
            collator = HeadCollator(int(tokenizer.pad_token_id))
            super().__init__(job, model, tokenizer, items, items_per_step, data_collator=collator)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the rank's items; the batch is `HeadCollator`'s."""
        labels = {name: inputs[name] for name in LABELS}
        outputs = model(**{name: value for name, value in inputs.items() if name not in LABELS}, use_cache=False)
        scores = outputs.logits.view(-1, len(self.heads.targets), self.heads.ensemble)
        pairs = len(labels["differs"])
        chosen, rejected, answers = scores.split([pairs, pairs, len(labels["graded"])])
        parts = self._losses(chosen, rejected, answers, labels)
        items = pairs + len(answers)
        loss = torch.stack([part.sum() for part in parts.values()]).sum() / items
        self._note(
            {name: part.detach().sum() for name, part in parts.items()}, items, scores, chosen - rejected, labels["differs"]
        )
        return (loss, outputs) if return_outputs else loss

    def _losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor, answers: torch.Tensor, labels: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        stage, differs, equal, weights = self.reward_stage, labels["differs"], labels["equal"], labels["pair_weights"]
        preferred = preference_loss(
            chosen,
            rejected,
            differs,
            labels["margins"],
            weights,
            margin_scale=stage.margin_scale,
            label_noise=stage.label_noise,
        )
        return {
            "pairs": preferred,
            "ties": stage.tie_weight * tie_loss(chosen, rejected, equal, weights),
            "centring": stage.center_coefficient * centring_loss(chosen, rejected, differs | equal),
            "grades": stage.grade_weight * grade_loss(answers, labels["grades"], labels["graded"], labels["answer_weights"]),
        }

    @torch.no_grad()
    def _note(
        self, parts: Mapping[str, torch.Tensor], items: int, scores: torch.Tensor, leads: torch.Tensor, differs: torch.Tensor
    ) -> None:
        """Parts of the loss, the mean score, and accuracy and lead where pairs differ (of the members' mean), over all ranks."""
        leading = leads.mean(dim=2)[differs]
        sums = [*parts.values(), scores.sum(), (leading > 0).sum(), leading.sum()]
        counts = [torch.tensor(count) for count in (items, scores.numel(), leading.numel())]
        totals = group.total(torch.stack([value.to(scores) for value in [*sums, *counts]])).tolist()
        (*losses, score, right, lead), (rows, numbers, differing) = totals[:-3], totals[-3:]
        for name, value in zip(parts, losses, strict=True):
            self.note(f"loss/{name}", value / rows)
        self.note("mean_reward", score / numbers)
        if differing:
            self.note("accuracy", right / differing)
            self.note("margin", lead / differing)


@dataclass(frozen=True)
class HeadCollator:
    """Joins rows of `reward_dataset` to a padded batch: first the better answers, then the worse, then graded answers.

    The batch is `input_ids`, `attention_mask` int64 [2 P + G, L]; of the P pairs `differs`, `equal` bool and `margins` fp32
    [P, targets] and `pair_weights` fp32 [P, members]; of the G answers `graded` bool and `grades` fp32 [G, targets] (0 where
    not graded) and `answer_weights` fp32 [G, members].
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        pairs, answers = [row for row in rows if row["rejected_ids"]], [row for row in rows if not row["rejected_ids"]]
        ids = [torch.tensor(row[name]) for name in ("chosen_ids", "rejected_ids") for row in pairs]
        ids += [torch.tensor(row["chosen_ids"]) for row in answers]
        targets, members = len(rows[0]["differs"]), len(rows[0]["weights"])

        def table(chosen: Sequence[Mapping[str, Any]], name: str, dtype: torch.dtype, width: int) -> torch.Tensor:
            return torch.tensor([row[name] for row in chosen], dtype=dtype).view(len(chosen), width)

        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "differs": table(pairs, "differs", torch.bool, targets),
            "equal": table(pairs, "equal", torch.bool, targets),
            "margins": table(pairs, "margins", torch.float32, targets),
            "pair_weights": table(pairs, "weights", torch.float32, members),
            "graded": table(answers, "graded", torch.bool, targets),
            "grades": table(answers, "grades", torch.float32, targets),
            "answer_weights": table(answers, "weights", torch.float32, members),
        }


class HeldoutAccuracy(TrainerCallback):
    """Scores held-out pairs about ten times over the stage: metrics `accuracy/BUCKET`, and nothing else changes.

    Every rank scores them, because under ZeRO-3 a forward pass needs all ranks; the first writes.
    """

    def __init__(self, trainer: RewardStageTrainer, heldout: Sequence[Mapping[str, Any]]) -> None:
        """Score the first of these normalised pairs that differ with the model that `trainer` trains.

        Args:
            trainer: of the model.
            heldout: all held-out pairs: a bucket is a rank among them, here as in the stage's evaluation.
        """
        stage, steps = trainer.reward_stage, trainer.section.steps
        ranked = zip(heldout, rank_pairs(heldout, difficulty_section(stage)), strict=True)
        watched = [(pair, rank) for pair, rank in ranked if differing(pair, stage.dimensions)][:WATCHED_PAIRS]
        self.trainer, self.records, self.ranks = trainer, [pair for pair, _ in watched], [rank for _, rank in watched]
        self.points = {max(round(steps * point / HELDOUT_POINTS), 1) for point in range(1, HELDOUT_POINTS + 1)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score after the step, where it is one of the points."""
        if state.global_step not in self.points:
            return
        model = self.trainer.model
        assert isinstance(model, MiniMaxText01ForSequenceClassification)
        values = accuracy_by_bucket(LearnedLevel(model, self.trainer.tokenizer), self.records, self.ranks)
        model.train()
        if group.rank() == 0:
            self.trainer.metrics.log(state.global_step, {f"accuracy/{bucket}": value for bucket, value in values.items()})


@contextmanager
def _taken_for_scalar(config: Any) -> Iterator[None]:
    """TRL refuses a model of several heads, for the sake of its own loss; the loss here is not its own."""
    names = dict(config.id2label)
    config.num_labels = 1
    try:
        yield
    finally:
        config.id2label = names
        config.label2id = {label: index for index, label in names.items()}
