"""SequenceLayout: boundaries, positions, shards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.layout import SequenceLayout

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 63, 64, 65]) | st.integers(0, 200), max_size=12)


@given(LENGTHS)
def test_fields_agree_with_a_loop_over_documents(lengths: list[int]) -> None:
    layout = SequenceLayout.from_lengths(lengths)
    assert layout.total == sum(lengths)
    assert layout.max_length == max(lengths, default=0)
    assert layout.num_documents == len(lengths)
    assert layout.position_ids.tolist() == [position for length in lengths for position in range(length)]
    assert layout.document_ids.tolist() == [document for document, length in enumerate(lengths) for _ in range(length)]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@given(LENGTHS)
def test_offsets_give_the_layout_back(lengths: list[int]) -> None:
    layout = SequenceLayout.from_lengths(lengths)
    assert SequenceLayout.from_cu_seqlens(layout.cu_seqlens).lengths == layout.lengths


@given(st.lists(st.integers(1, 70), max_size=12))
def test_positions_give_the_layout_of_documents_with_tokens_back(lengths: list[int]) -> None:
    layout = SequenceLayout.from_lengths(lengths)
    assert SequenceLayout.from_position_ids(layout.position_ids[None]).lengths == tuple(lengths)


@given(LENGTHS, st.integers(1, 9))
def test_shards_cover_every_token_once_in_order(lengths: list[int], world_size: int) -> None:
    layout = SequenceLayout.from_lengths(lengths)
    shards = [layout.shard(rank, world_size) for rank in range(world_size)]
    share = -(-layout.total // world_size)
    assert sum(shard.total for shard in shards) == layout.total
    assert all(shard.total <= share for shard in shards)
    documents = layout.document_ids.tolist()
    offset = 0
    for shard in shards:
        mine = documents[offset : offset + shard.total]
        runs = [mine.count(document) for document in dict.fromkeys(mine)]
        assert list(shard.lengths) == runs
        offset += shard.total


@pytest.mark.parametrize("bad", [[1, -1], [-3]])
def test_negative_lengths_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        SequenceLayout.from_lengths(bad)


def test_offsets_and_positions_that_do_not_start_at_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="start at 0"):
        SequenceLayout.from_cu_seqlens(torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="start at 0"):
        SequenceLayout.from_position_ids(torch.tensor([1, 2, 0]))
    with pytest.raises(ValueError, match="rank must be"):
        SequenceLayout.from_lengths([3]).shard(2, 2)
