"""Packing: whole documents, no bin too full, few bins."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.packing import pack

PACK_LENGTH = 64


@given(st.lists(st.integers(1, PACK_LENGTH), max_size=300))
def test_every_document_lies_in_one_bin_and_no_bin_is_too_full(lengths: list[int]) -> None:
    bins = pack(lengths, PACK_LENGTH)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= PACK_LENGTH for members in bins)


@given(st.lists(st.integers(1, PACK_LENGTH), max_size=300))
def test_documents_keep_their_order_within_and_between_bins(lengths: list[int]) -> None:
    bins = pack(lengths, PACK_LENGTH)
    assert all(members == sorted(members) for members in bins)
    assert [members[0] for members in bins] == sorted(members[0] for members in bins)


@given(st.lists(st.integers(1, PACK_LENGTH), min_size=1, max_size=60))
def test_at_most_one_bin_of_few_documents_is_less_than_half_full(lengths: list[int]) -> None:
    # With at most OPEN_BINS bins none is closed early, so two bins that fit together would have been one.
    bins = pack(lengths, PACK_LENGTH)
    assert sum(2 * sum(lengths[i] for i in members) <= PACK_LENGTH for members in bins) <= 1


def test_random_lengths_fill_sequences_to_97_percent() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(10, 256) for _ in range(5000)]
    bins = pack(lengths, 1024)
    assert sum(lengths) / (1024 * len(bins)) > 0.97


def test_bins_hold_documents_of_mixed_lengths() -> None:
    rng = random.Random(0)
    lengths = [rng.choice([27, 28]) for _ in range(3000)]
    bins = pack(lengths, 768)
    pure = [members for members in bins if len({lengths[i] for i in members}) == 1]
    assert len(pure) <= 2  # the last, unfilled bins


@pytest.mark.parametrize("lengths", [[3, 0], [65], [-1]])
def test_lengths_outside_the_sequence_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="outside 1..64"):
        pack(lengths, PACK_LENGTH)
