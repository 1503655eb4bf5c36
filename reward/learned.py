"""The learned level: heads for the dimensions on one trunk, read at the end of the answer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.data.encode import encode_answer, encode_prompt
from posttrain.data.layout import SequenceLayout
from posttrain.model.modeling import MiniMaxText01ForSequenceClassification
from posttrain.reward.heads import Heads, HeadScore
from posttrain.reward.types import Sample


class LearnedLevel:
    """Scores answers with a reward model, as documents of prompt, answer and stop token, packed without padding.

    Args:
        model: the reward model; it is put into eval mode.
        tokenizer: its tokenizer.
        batch_tokens: tokens of a forward pass at most, unless one document alone is longer.

    Attributes:
        heads: which columns of the model speak about what.

    Raises:
        UserError: the model's configuration does not say what its heads are, see `posttrain.reward.heads`.
    """

    def __init__(
        self, model: MiniMaxText01ForSequenceClassification, tokenizer: PreTrainedTokenizerBase, batch_tokens: int = 16_384
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self.heads = Heads.from_config(model.config, "id2label")
        self.model, self.tokenizer, self.batch_tokens = model.eval(), tokenizer, batch_tokens

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """One unbounded score a sample, in order: of the first target, the mean over its members.

        Raises:
            UserError: a prompt that the chat template cannot render, see `posttrain.data.encode`.
        """
        first = self.heads.targets[0]
        return [scores[first].mean for scores in self.dimension_scores(samples)]

    def dimension_scores(self, samples: Sequence[Sample]) -> list[dict[str, HeadScore]]:
        """The score of every target for each sample, in order. UserError as `scores`."""
        return [
            {target: HeadScore(_mean(row), _std(row)) for target, row in zip(self.heads.targets, rows, strict=True)}
            for rows in self.member_scores(samples)
        ]

    def member_scores(self, samples: Sequence[Sample]) -> list[list[list[float]]]:
        """Every head's score: a list of targets of lists of members, for each sample. UserError as `scores`."""
        documents = [encode_prompt(self.tokenizer, s.prompt) + encode_answer(self.tokenizer, s.answer) for s in samples]
        scores: list[list[list[float]]] = [[]] * len(documents)
        for batch in batches_by_tokens([len(document) for document in documents], self.batch_tokens):
            for index, score in zip(batch, self._forward([documents[i] for i in batch]), strict=True):
                scores[index] = score
        return scores

    @torch.inference_mode()
    def _forward(self, documents: list[list[int]]) -> list[list[list[float]]]:
        """fp32 logits at the stop token, as lists [documents, targets, members]."""
        device = self.model.device
        tokens = torch.tensor([[token for document in documents for token in document]], dtype=torch.int64, device=device)
        layout = SequenceLayout.from_lengths([len(document) for document in documents], device)
        logits = self.model(input_ids=tokens, layout=layout).logits.float()
        scores: list[list[list[float]]] = logits.view(len(documents), -1, self.heads.ensemble).tolist()
        return scores


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in groups of neighbouring length whose tokens sum to at most `batch_tokens`; a longer one stands alone."""
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or used + lengths[index] > batch_tokens:
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += lengths[index]
    return batches
