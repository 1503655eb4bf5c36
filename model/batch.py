"""From what callers hand in (padded or packed, with or without a mask) to flat tokens and a layout, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.data.layout import SequenceLayout
from posttrain.model.cache import HybridCache


@dataclass(frozen=True)
class FlatBatch:
    """Tokens without padding.

    Attributes:
        tokens: ids [T], or embeddings [T, hidden].
        layout: their documents.
        places: index into the flattened [B * L] input of every token, or None where nothing was padded.
        shape: (B, L) of the input.
    """

    tokens: torch.Tensor
    layout: SequenceLayout
    places: torch.Tensor | None
    shape: tuple[int, int]

    def flat(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [T, ...]."""
        merged = padded.flatten(0, 1)
        return merged if self.places is None else merged[self.places]

    def restore(self, flat: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [B, L, ...], zero where the input was padding."""
        if self.places is None:
            return flat.view(*self.shape, *flat.shape[1:])
        full = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:])
        return full.index_copy(0, self.places, flat).view(*self.shape, *flat.shape[1:])


def flatten_batch(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    layout: SequenceLayout | None = None,
    cache: HybridCache | None = None,
) -> FlatBatch:
    """Read the documents off a batch.

    A `layout` (packed, [1, T]) says everything. Else padding is what `attention_mask` marks with zeros (left, right or both
    sides), and a row is one document, unless `position_ids` restart at 0 inside it, which starts a new one. Position ids
    otherwise rise by one; where a row starts counting does not matter, since only differences of positions enter the model.

    Args:
        inputs: ids [B, L] or embeddings [B, L, hidden].
        attention_mask: [B, L] of zeros and ones; with a cache, [B, columns + L] as transformers makes it, or [B, L].
        position_ids: [B, L], or [1, L] or [L] for all rows.
        layout: documents of a packed batch.
        cache: rows that the batch continues, one document each.

    Raises:
        ValueError: a layout that does not fit the tokens, a mask with holes or of another shape, position ids that describe
            no documents, several documents for one row of a cache.
    """
    if inputs.dim() not in (2, 3):
        raise ValueError(f"input_ids must be [batch, length], got {tuple(inputs.shape)}")
    rows, length = inputs.shape[:2]
    if layout is not None:
        if rows != 1 or layout.total != length:
            raise ValueError(f"a layout of {layout.total} tokens needs input_ids [1, {layout.total}], got [{rows}, {length}]")
        return FlatBatch(inputs[0], layout.to(inputs.device), None, (rows, length))
    if length == 1 and cache is not None and _continues(attention_mask, rows, cache):
        return FlatBatch(inputs.flatten(0, 1), cache.step_layout(inputs.device), None, (rows, length))
    places, lengths = None, [length] * rows
    if attention_mask is not None:
        mask = _mask(attention_mask, rows, length, cache)
        lengths = mask.sum(dim=1).tolist()
        places = mask.flatten().nonzero().squeeze(1)
    if position_ids is not None:
        lengths = _documents(_positions(position_ids, rows, length), places, lengths, inputs.device)
        if cache is not None and len(lengths) != cache.batch_size:
            raise ValueError("position_ids restart inside a row, which a cache cannot continue; give each document its own row")
    flat = inputs.flatten(0, 1)
    return FlatBatch(
        flat if places is None else flat[places], SequenceLayout.from_lengths(lengths, inputs.device), places, (rows, length)
    )


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """ValueError for arguments of transformers' models that would change the result and that this model does not know."""
    for name in ("shift_labels", "head_mask", "encoder_hidden_states", "cache_position"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} is not supported by this model; leave it out")
    if arguments.get("output_attentions"):
        raise ValueError("output_attentions is not supported: lightning layers have no attention weights; leave it out")


def _continues(attention_mask: torch.Tensor | None, rows: int, cache: HybridCache) -> bool:
    """Whether a batch of one column adds a token to every row of a cache: position ids of single tokens say nothing more."""
    if rows != cache.batch_size:
        return False
    if attention_mask is None:
        return True
    return attention_mask.shape == (rows, cache.columns + 1) and bool(attention_mask[:, -1].all())


def _mask(attention_mask: torch.Tensor, rows: int, length: int, cache: HybridCache | None) -> torch.Tensor:
    """The mask of the batch's own columns, bool [B, L], without holes."""
    seen = cache.columns if cache is not None else 0
    if attention_mask.shape not in ((rows, length), (rows, seen + length)):
        wanted = f"{(rows, length)} like input_ids" + (f" or {(rows, seen + length)} with the cache's columns" if seen else "")
        raise ValueError(f"attention_mask must be {wanted}, got {tuple(attention_mask.shape)}")
    mask = attention_mask[:, attention_mask.shape[1] - length :].bool()
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1)
    if length and rows and int(starts.add(mask[:, 0]).max()) > 1:
        raise ValueError("attention_mask has holes; use a packed batch with a layout for several documents in a row")
    return mask


def _positions(position_ids: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Position ids [B, L]."""
    given = position_ids[None] if position_ids.dim() == 1 else position_ids
    if given.shape not in ((rows, length), (1, length)):
        raise ValueError(f"position_ids must be {(rows, length)} like input_ids, got {tuple(position_ids.shape)}")
    return given.expand(rows, length)


def _documents(positions: torch.Tensor, places: torch.Tensor | None, lengths: list[int], device: torch.device) -> list[int]:
    """Lengths of the documents in rows that hold `lengths` tokens; an empty row is an empty document."""
    flat = positions.to(device).flatten()
    flat = flat if places is None else flat[places]
    row = SequenceLayout.from_lengths(lengths, device).document_ids
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    restarts = ~first & (flat == 0)
    rises = torch.ones_like(first)
    rises[1:] = flat[1:] == flat[:-1] + 1
    wrong = ~(first | restarts | rises)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"position_ids go from {int(flat[at - 1])} to {int(flat[at])} in row {int(row[at])}; "
            "they must rise by one, or restart at 0 where a new document begins"
        )
    starts = (first | restarts).nonzero().flatten().tolist()
    owners = row[first | restarts].tolist()
    sizes = [stop - start for start, stop in zip(starts, [*starts[1:], len(flat)], strict=True)]
    per_row: list[list[int]] = [[] for _ in lengths]
    for owner, size in zip(owners, sizes, strict=True):
        per_row[owner].append(size)
    return [size for pieces in per_row for size in (pieces or [0])]
