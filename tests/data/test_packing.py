"""Packing: whole documents, no bin too full, few bins."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.packing import pack

PACK_LENGTH = 64


@given(st.lists(st.integers(1, PACK_LENGTH), max_size=80), st.integers(0, 5))
def test_every_document_lies_in_one_bin_and_no_bin_is_too_full(lengths: list[int], seed: int) -> None:
    bins = pack(lengths, PACK_LENGTH, seed)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= PACK_LENGTH for members in bins)
    assert bins == pack(lengths, PACK_LENGTH, seed)


@given(st.lists(st.integers(1, PACK_LENGTH), min_size=1, max_size=80))
def test_bins_stay_within_the_known_bound_of_best_fit_decreasing(lengths: list[int]) -> None:
    # 11/9 OPT + 6/9 (Dosa 2007, first-fit decreasing; Johnson 1974: best-fit decreasing is no worse), OPT >= sum / capacity.
    # Here against a plain first-fit-decreasing, written anew.
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[fits[0]] -= length
        else:
            rooms.append(PACK_LENGTH - length)
    assert len(pack(lengths, PACK_LENGTH, 0)) <= -(-11 * len(rooms) // 9) + 1


def test_random_lengths_fill_sequences_to_97_percent() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(10, 256) for _ in range(3000)]
    bins = pack(lengths, 1024, 0)
    assert sum(lengths) / (1024 * len(bins)) > 0.97


def test_the_seed_changes_the_order_of_bins() -> None:
    lengths = [random.Random(0).randint(1, 60) for _ in range(50)] * 2
    assert pack(lengths, PACK_LENGTH, 0) != pack(lengths, PACK_LENGTH, 1)


@pytest.mark.parametrize("lengths", [[3, 0], [65], [-1]])
def test_lengths_outside_the_sequence_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="outside 1..64"):
        pack(lengths, PACK_LENGTH, 0)
