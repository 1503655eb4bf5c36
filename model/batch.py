"""From what callers hand in (padded or packed, with or without a mask) to flat tokens and a layout, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posttrain.data.layout import SequenceLayout


@dataclass(frozen=True)
class FlatBatch:
    """Tokens without padding.

    Attributes:
        tokens: [T] ids.
        layout: their documents.
        places: index into the flattened [B * L] input of every token, or None where nothing was padded.
        shape: (B, L) of the input.
    """

    tokens: torch.Tensor
    layout: SequenceLayout
    places: torch.Tensor | None
    shape: tuple[int, int]

    def restore(self, flat: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [B, L, ...], zero where the input was padding."""
        if self.places is None:
            return flat.view(*self.shape, *flat.shape[1:])
        full = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:])
        return full.index_copy(0, self.places, flat).view(*self.shape, *flat.shape[1:])


def flatten_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    layout: SequenceLayout | None = None,
) -> FlatBatch:
    """Read the documents off a batch.

    In order of precedence: `layout` (packed, [1, T]); `attention_mask` [B, L] of zeros and ones (padding left, right or
    both sides; each row one document); `position_ids` of a single packed row, which restart at 0 with every document;
    else each row is a document.

    Raises:
        ValueError: a layout that does not fit the tokens, a mask with holes or of another shape.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [batch, length], got {tuple(input_ids.shape)}")
    rows, length = input_ids.shape
    if layout is not None:
        if rows != 1 or layout.total != length:
            raise ValueError(f"a layout of {layout.total} tokens needs input_ids [1, {layout.total}], got [{rows}, {length}]")
        return FlatBatch(input_ids[0], layout.to(input_ids.device), None, (rows, length))
    if attention_mask is not None:
        return _from_mask(input_ids, attention_mask)
    if position_ids is not None and rows == 1:
        return FlatBatch(input_ids[0], SequenceLayout.from_position_ids(position_ids), None, (rows, length))
    return FlatBatch(input_ids.flatten(), SequenceLayout.from_lengths([length] * rows, input_ids.device), None, (rows, length))


def _from_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> FlatBatch:
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {tuple(input_ids.shape)} like input_ids, got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool()
    if (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1).add(mask[:, 0]).max() > 1:
        raise ValueError("attention_mask has holes; use a packed batch with a layout for several documents in a row")
    layout = SequenceLayout.from_lengths(mask.sum(dim=1).tolist(), input_ids.device)
    places = mask.flatten().nonzero().squeeze(1)
    return FlatBatch(input_ids.flatten()[places], layout, places, (input_ids.shape[0], input_ids.shape[1]))
