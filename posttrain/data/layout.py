"""Document boundaries of a packed batch: the one description that every attention layer takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class SequenceLayout:
    """Documents lying one behind the other on a token axis of length `total`.

    Lengths live on the host as well as on the device, so that no kernel needs to wait for the device to learn a shape.
    Documents may be empty; attention and recurrent state never cross from one document into the next.

    Attributes:
        lengths: tokens of each document, on the host.
        device: where `cu_seqlens`, `position_ids` and `document_ids` are made.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> SequenceLayout:
        """Layout of documents of the given lengths (each at least 0; ValueError otherwise)."""
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"document lengths must be at least 0, got {min(lengths)}")
        return cls(lengths, torch.device(device))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor) -> SequenceLayout:
        """Layout from offsets [N + 1], starting at 0 and never falling (waits for the device once)."""
        offsets = cu_seqlens.tolist()
        if not offsets or offsets[0] != 0:
            raise ValueError("cu_seqlens must start at 0")
        return cls.from_lengths([b - a for a, b in zip(offsets, offsets[1:], strict=False)], cu_seqlens.device)

    @classmethod
    def from_position_ids(cls, position_ids: torch.Tensor) -> SequenceLayout:
        """Layout from position ids [T] that restart at 0 with every document, as TRL's padding-free collator makes them."""
        positions = position_ids.flatten()
        starts = (positions == 0).nonzero().flatten().tolist()
        if positions.numel() and (not starts or starts[0] != 0):
            raise ValueError("position ids of a packed batch must start at 0")
        ends = [*starts[1:], positions.numel()] if starts else []
        return cls.from_lengths([b - a for a, b in zip(starts, ends, strict=True)], positions.device)

    @property
    def total(self) -> int:
        """Tokens in all documents."""
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest document, 0 without documents."""
        return max(self.lengths, default=0)

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.lengths)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Offsets of the documents, int32 [num_documents + 1]."""
        offsets = [0]
        for length in self.lengths:
            offsets.append(offsets[-1] + length)
        return torch.tensor(offsets, dtype=torch.int32, device=self.device)

    @cached_property
    def document_ids(self) -> torch.Tensor:
        """Document of every token, int64 [total]."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=self.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.device), lengths, output_size=self.total)

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """Position of every token in its document, int64 [total]."""
        return torch.arange(self.total, device=self.device) - self.cu_seqlens.long()[self.document_ids]

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout on another device."""
        return self if torch.device(device) == self.device else SequenceLayout(self.lengths, torch.device(device))

    def shard(self, rank: int, world_size: int) -> SequenceLayout:
        """Layout of a rank's contiguous share of the token axis: ceil(total / world_size) tokens, the last ranks fewer.

        A document that crosses the border is cut there; its first part on this rank is not its start. `position_ids`
        of the shard count from the cut, so callers that need absolute positions slice those of the whole layout.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        share = -(-self.total // world_size)
        start, stop = min(rank * share, self.total), min((rank + 1) * share, self.total)
        lengths, offset = [], 0
        for length in self.lengths:
            overlap = min(stop, offset + length) - max(start, offset)
            if overlap > 0:
                lengths.append(overlap)
            offset += length
        return SequenceLayout.from_lengths(lengths, self.device)
