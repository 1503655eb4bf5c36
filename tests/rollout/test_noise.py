"""The noise: uniform, in its range, a function of seed and position, and free of collisions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rollout.noise import derive_seed, uniform

SEED = st.integers(-(2**63), 2**63 - 1)


def splitmix64(seed: int, position: int) -> float:
    """SplitMix64's output number `position` (from 0) of a generator started at `seed`, by Python's integers."""
    mask = (1 << 64) - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def test_the_published_first_outputs_of_splitmix64() -> None:
    """For seed 1234567, as listed at Rosetta Code."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    for position, output in enumerate(outputs):
        assert uniform(torch.tensor([1234567]), position).item() == (output >> 11) * 2.0**-53


@given(SEED, st.integers(0, 2**31))
def test_numbers_are_splitmix64_and_below_one(seed: int, position: int) -> None:
    number = uniform(torch.tensor([seed]), position)
    assert number.dtype == torch.float64
    assert number.item() == splitmix64(seed, position)
    assert 0.0 <= number.item() < 1.0


def test_numbers_do_not_depend_on_their_neighbours() -> None:
    seeds = torch.arange(50) * 7919
    together = uniform(seeds, 3)
    assert torch.equal(together, torch.cat([uniform(seed[None], 3) for seed in seeds]))


@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_numbers_are_spread_evenly(axis: str) -> None:
    """Chi-square over 64 cells (bound of 1 in 10,000: 110), and neighbours without correlation."""
    count = 20_000
    if axis == "seeds":
        numbers = uniform(torch.arange(count), 0)
    else:
        numbers = torch.cat([uniform(torch.tensor([12]), position) for position in range(count)])
    cells = torch.histc(numbers, bins=64, min=0, max=1)
    assert float(((cells - count / 64) ** 2).sum() / (count / 64)) < 110
    assert numbers.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / count) ** 0.5)
    correlation = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1].item()
    assert abs(correlation) < 4 / count**0.5
    assert numbers.unique().numel() == count


def test_the_order_of_parts_matters_and_nothing_collides() -> None:
    grid = list(itertools.product(range(12), repeat=3))
    seeds = {parts: derive_seed(*parts) for parts in grid}
    assert len(set(seeds.values())) == len(grid)
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert all(derive_seed(*parts) != derive_seed(*reversed(parts)) for parts in grid if parts != parts[::-1])
    # Nor do shorter and longer lists of parts.
    assert len({derive_seed(*[0] * length) for length in range(10)}) == 10


@given(st.lists(st.integers(-(2**70), 2**70), max_size=4))
def test_seeds_fit_into_63_bits_and_are_always_the_same(parts: list[int]) -> None:
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)
    torch.tensor([seed], dtype=torch.int64)


def test_streams_of_derived_seeds_do_not_repeat_each_other() -> None:
    """Numbers of nearby requests at nearby positions: all different."""
    seeds = torch.tensor([derive_seed(0, step, prompt) for step in range(10) for prompt in range(20)])
    numbers = torch.cat([uniform(seeds, position) for position in range(50)])
    assert numbers.unique().numel() == numbers.numel()
