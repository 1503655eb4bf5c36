"""Packing whole documents into sequences of bounded length."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], pack_length: int, seed: int) -> list[list[int]]:
    """Put documents into as few bins as best-fit-decreasing finds; none is cut.

    The longest document is placed first, each into the fullest bin that still holds it. Documents of one length are placed
    in an order drawn from the seed, and the bins and their contents are shuffled, so that training does not go from long
    to short.

    Args:
        lengths: tokens of each document, 1 to `pack_length`.
        pack_length: tokens a bin holds.
        seed: equal arguments give equal bins.

    Returns:
        Indices of the documents of each bin; every document is in exactly one.

    Raises:
        ValueError: a length outside 1..pack_length.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= pack_length:
            raise ValueError(f"document {index} has {length} tokens, outside 1..{pack_length}")
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lambda index: -lengths[index])  # stable: ties stay shuffled
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins with that room
    rooms: list[int] = []  # the keys of by_room, sorted
    for index in order:
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen = pack_length, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        bins[chosen].append(index)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(chosen)
    for members in bins:
        rng.shuffle(members)
    rng.shuffle(bins)
    return bins
