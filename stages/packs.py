"""Packed datasets: the documents of a whole stage, laid into sequences before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from posttrain.config.schema import StageSection
from posttrain.data.encode import IGNORE, Document
from posttrain.data.layout import SequenceLayout
from posttrain.data.mixture import sample_mixture
from posttrain.data.packing import pack


@dataclass(frozen=True)
class Group:
    """Documents that must lie in one pack: one of supervised fine-tuning, the two of a preference pair."""

    documents: tuple[Document, ...]

    def __len__(self) -> int:
        return sum(len(document) for document in self.documents)


class PackedDataset(Dataset[list[int]]):
    """Item n is the n-th pack of the stage: indices into `groups`."""

    def __init__(self, groups: Sequence[Group], packs: Sequence[list[int]]) -> None:
        self.groups, self.packs = groups, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[int]:
        return self.packs[index]


def plan_packs(sources: Mapping[str, Sequence[Group]], stage: StageSection, seed: int) -> PackedDataset:
    """Exactly `steps * batch_size` packs, drawn from the sources by the stage's weights.

    As many documents are drawn as fill the packs; what is left over when the last pack is full is not trained on.

    Args:
        sources: SOURCE/SPLIT -> its groups, each at most `pack_length` tokens.
        stage: gives weights, lengths and number of packs.
        seed: equal arguments give equal packs.

    Raises:
        UserError: a source with weight has no groups.
    """
    refs = list(sources)
    counts = {ref: len(sources[ref]) for ref in refs}
    offsets = dict(zip(refs, _offsets([counts[ref] for ref in refs]), strict=True))
    groups = [group for ref in refs for group in sources[ref]]
    needed = stage.steps * stage.batch_size
    drawn = needed
    while True:
        order = [offsets[ref] + index for ref, index in sample_mixture(counts, stage.data, drawn, seed)]
        packs = pack([len(groups[index]) for index in order], stage.pack_length)
        if len(packs) >= needed:
            return PackedDataset(groups, [[order[place] for place in members] for members in packs[:needed]])
        # The shortage scales with the draw, so a few rounds suffice whatever the lengths are.
        drawn = max(int(drawn * needed / len(packs) * 1.01) + 1, drawn + 1)


@dataclass(frozen=True)
class PackCollator:
    """Joins the packs of a rank's batch to one row.

    The batch is a dict of `input_ids` int64 [1, T], `labels` int64 [T] (-100 where not trained; never a document's first
    token, which nothing predicts), `lengths` (tokens of each document) and `groups` (index of each group, in order).
    """

    groups: Sequence[Group]

    def __call__(self, packs: Sequence[list[int]]) -> dict[str, Any]:
        members = [index for pack_members in packs for index in pack_members]
        documents = [document for index in members for document in self.groups[index].documents]
        labels = [label for document in documents for label in (IGNORE, *document.labels[1:])]
        return {
            "input_ids": torch.tensor([[token for document in documents for token in document.input_ids]], dtype=torch.int64),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "lengths": [len(document) for document in documents],
            "groups": members,
        }


def layout_of(batch: Mapping[str, Any]) -> SequenceLayout:
    """The layout of a collated batch, on the device of its tokens."""
    return SequenceLayout.from_lengths(batch["lengths"], batch["input_ids"].device)


def document_sums(values: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """Sum of per-token values [T] over each document, [documents]; differentiable.

    Documents are summed one by one: a scatter's order, and with it the last bits, would depend on the batch.
    """
    return torch.stack([part.sum() for part in values.split(list(layout.lengths))])


def _offsets(counts: Sequence[int]) -> list[int]:
    offsets = [0]
    for count in counts[:-1]:
        offsets.append(offsets[-1] + count)
    return offsets
