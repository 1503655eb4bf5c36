"""The learned level: a scalar head on the model, read at the end of the answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.data.encode import encode_answer, encode_prompt
from posttrain.data.layout import SequenceLayout
from posttrain.model.modeling import MiniMaxText01ForSequenceClassification
from posttrain.reward.types import Sample


class LearnedLevel:
    """Scores answers with a reward model, as documents of prompt, answer and stop token, packed without padding.

    Args:
        model: the reward model; it is put into eval mode.
        tokenizer: its tokenizer.
        batch_tokens: tokens of a forward pass at most, unless one document alone is longer.
    """

    def __init__(
        self, model: MiniMaxText01ForSequenceClassification, tokenizer: PreTrainedTokenizerBase, batch_tokens: int = 16_384
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self.model, self.tokenizer, self.batch_tokens = model.eval(), tokenizer, batch_tokens

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """One unbounded score a sample, in order, read in fp32 at the stop token.

        Raises:
            UserError: a prompt that the chat template cannot render, see `posttrain.data.encode`.
        """
        documents = [encode_prompt(self.tokenizer, s.prompt) + encode_answer(self.tokenizer, s.answer) for s in samples]
        scores = [0.0] * len(documents)
        for batch in batches_by_tokens([len(document) for document in documents], self.batch_tokens):
            for index, score in zip(batch, self._forward([documents[i] for i in batch]), strict=True):
                scores[index] = score
        return scores

    @torch.inference_mode()
    def _forward(self, documents: list[list[int]]) -> list[float]:
        device = self.model.device
        tokens = torch.tensor([[token for document in documents for token in document]], dtype=torch.int64, device=device)
        layout = SequenceLayout.from_lengths([len(document) for document in documents], device)
        scores: list[float] = self.model(input_ids=tokens, layout=layout).logits.float().flatten().tolist()
        return scores


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
