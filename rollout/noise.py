"""Noise that depends on a request's own seed and position alone, so that no batch changes what is sampled."""

from __future__ import annotations

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def uniform(seeds: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) for each seed, fp64 [B].

    Args:
        seeds: int64 [B].
        position: index of the token in its answer; the same for all, or int64 [B].

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), a counter-based generator.
    """
    step = (position + 1) * _GOLDEN
    state = seeds + (_wrap(step) if isinstance(step, int) else step)  # tensors wrap by themselves
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    state = state ^ _shift(state, 31)
    return _shift(state, 11).to(torch.float64) * 2.0**-53


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers such as (run seed, step, prompt, sample); order matters."""
    state = 0
    for part in parts:
        state = _finalise(state ^ (part & _MASK))
    return state >> 1


_MASK = (1 << 64) - 1


def _finalise(value: int) -> int:
    value = (value + (_GOLDEN & _MASK)) & _MASK
    value = ((value ^ (value >> 30)) * (_MIX_1 & _MASK)) & _MASK
    value = ((value ^ (value >> 27)) * (_MIX_2 & _MASK)) & _MASK
    return value ^ (value >> 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """A Python integer as the signed 64-bit integer of the same bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
