"""How documents are read off a batch: masks, position ids and layouts, and what is refused."""

from __future__ import annotations

import pytest
import torch

from posttrain.data.layout import SequenceLayout
from posttrain.model.cache import HybridCache
from tests.model.small import packed, random_tokens, small_model

MODEL = small_model(dtype=torch.float64)


def same(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """Equal up to the roundings of fp64."""
    torch.testing.assert_close(ours, truth, rtol=0.0, atol=1e-10)


def alone(document: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of a document that nothing accompanies."""
    logits: torch.Tensor = MODEL(document[None]).logits[0]
    return logits


def test_position_ids_that_restart_pack_like_a_layout() -> None:
    tokens, layout = packed(*(random_tokens(length, seed=place) for place, length in enumerate([17, 64, 1, 70])))
    with torch.no_grad():
        by_positions = MODEL(tokens, position_ids=layout.position_ids[None]).logits
        assert torch.equal(by_positions, MODEL(tokens, layout=layout).logits)
        assert not torch.equal(by_positions, MODEL(tokens).logits)


def test_position_ids_that_restart_pack_several_rows_with_and_without_padding() -> None:
    rows = [[17, 40], [1, 1, 50], [57], [20, 30]]  # the last one is padded
    documents = [[random_tokens(length, seed=10 * r + n) for n, length in enumerate(lengths)] for r, lengths in enumerate(rows)]
    tokens, positions, mask = (torch.zeros(4, 57, dtype=torch.int64) for _ in range(3))
    for row, texts_of_row in enumerate(documents):
        total = sum(map(len, texts_of_row))
        tokens[row, :total] = torch.cat(texts_of_row)
        positions[row, :total] = torch.cat([torch.arange(len(document)) for document in texts_of_row])
        mask[row, :total] = 1
    with torch.no_grad():
        padded = MODEL(tokens, attention_mask=mask, position_ids=positions).logits
        whole = MODEL(tokens[:1], position_ids=positions[:1]).logits
        several = MODEL(tokens[:3], position_ids=positions[:3]).logits
    same(whole, padded[:1])
    same(several[0], padded[0])
    for row, texts_of_row in enumerate(documents):
        logits = padded[row, : sum(map(len, texts_of_row))].split([len(document) for document in texts_of_row])
        for document, got in zip(texts_of_row, logits, strict=True):
            same(got, alone(document))


def test_position_ids_that_only_count_change_nothing() -> None:
    """Wherever a row starts to count: only differences of positions enter the model."""
    tokens, mask = torch.stack([random_tokens(9), random_tokens(9, seed=1)]), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    counts = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        truth = MODEL(tokens, attention_mask=mask).logits
        for positions in (counts, torch.arange(9), torch.arange(9)[None], torch.arange(9).expand(2, 9) + 5):
            same(MODEL(tokens, attention_mask=mask, position_ids=positions).logits, truth)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 1, 3, 4], [0, 1, 2, 3]], "go from 1 to 3 in row 0"),
        ([[0, 1, 2, 3], [0, 1, 1, 2]], "go from 1 to 1 in row 1"),
        ([[0, 1, 2]], "must be"),
        ([[0, 1, 2, 3]] * 3, "must be"),
    ],
)
def test_position_ids_that_describe_no_documents_are_refused(positions: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODEL(torch.zeros(2, 4, dtype=torch.int64), position_ids=torch.tensor(positions))


def test_a_row_of_a_cache_takes_one_document_at_a_time() -> None:
    tokens, layout = packed(random_tokens(3), random_tokens(4))
    cache = HybridCache(MODEL.config, 1, 8, device="cpu", dtype=torch.float64)
    with pytest.raises(ValueError, match="which a cache cannot continue"):
        MODEL(tokens, position_ids=layout.position_ids, past_key_values=cache)


def test_arguments_that_would_change_the_result_unheard_are_refused() -> None:
    tokens = random_tokens(4)[None]
    for arguments in ({"output_attentions": True}, {"shift_labels": tokens}, {"head_mask": torch.ones(4)}):
        with pytest.raises(ValueError, match="is not supported"):
            MODEL(tokens, **arguments)
    MODEL(tokens, output_attentions=False, seq_idx=None)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0, 1]], "holes"),
        ([[0, 1, 0, 1]], "holes"),
        ([[1, 0, 0, 1]], "holes"),
        ([[1, 1, 1, 1], [1, 0, 1, 0]], "holes"),
        ([[1, 1, 1]], "must be"),
    ],
)
def test_masks_that_describe_no_document_are_refused(mask: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODEL(torch.zeros(len(mask), 4, dtype=torch.int64), attention_mask=torch.tensor(mask))


def test_layouts_that_do_not_fit_the_tokens_are_refused() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    for layout, ids in [
        (SequenceLayout.from_lengths([3]), tokens),
        (SequenceLayout.from_lengths([3, 2]), tokens),
        (SequenceLayout.from_lengths([4]), tokens.view(2, 2)),
    ]:
        with pytest.raises(ValueError, match="needs input_ids"):
            MODEL(ids, layout=layout)
    with pytest.raises(ValueError, match=r"must be \[batch, length\]"):
        MODEL(tokens[0])
