"""Checksums of tensors: a cryptographic one for the host, a fast one that runs where the tensor lies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import torch

Algorithm = Literal["sha256", "sum64"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

_WORDS = 1 << 22
"""Words of 32 bits that `sum64` takes at once; their keys need 8 bytes each."""


def checksum(tensor: torch.Tensor, algorithm: Algorithm) -> str:
    """Checksum of a tensor's bytes, row by row, as hexadecimal digits.

    `sha256` is that of FIPS 180-4 and holds against anybody. `sum64` holds against accidents only: the sum over 32-bit words,
    modulo 2^64, of the word times a key of its place. Keys are odd, so a change within one word, a flipped bit or byte, is
    always seen; of random changes of several words about one in 2^31 or fewer is missed. Who chooses the change can hide it.

    Args:
        tensor: of any type, shape and device. `sha256` copies it to the host, `sum64` gives the same digits on every device.
        algorithm: which.

    Raises:
        ValueError: an algorithm that is neither.
    """
    compute = _COMPUTE.get(algorithm)
    if compute is None:
        raise ValueError(f"checksum {algorithm!r} is not known; expected one of {', '.join(ALGORITHMS)}")
    return compute(tensor.detach().contiguous().view(-1))


def sha256(data: memoryview) -> str:
    """`sha256` of bytes on the host."""
    return hashlib.sha256(data).hexdigest()


def _of_host_bytes(flat: torch.Tensor) -> str:
    return sha256(flat.cpu().view(torch.uint8).numpy().data)


def _sum64(flat: torch.Tensor) -> str:
    data = flat.view(torch.uint8)
    blocks = [data[start : start + 4 * _WORDS] for start in range(0, len(data), 4 * _WORDS)]
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for block, key in zip(blocks, _keys(len(blocks), 1, data.device), strict=True):
        words = _words(block).long()
        total += (words * _keys(_WORDS, 0, data.device)[: len(words)]).sum() * key
    return f"{int(total) % 2**64:016x}"


def _words(data: torch.Tensor) -> torch.Tensor:
    """Bytes [n] as int32 [n / 4], zeros added at the end where they do not fill the last one."""
    if len(data) % 4:
        data = torch.cat([data, data.new_zeros(-len(data) % 4)])
    elif data.storage_offset() % 4:
        data = data.clone()  # no word begins at such a byte
    return data.view(torch.int32)


@lru_cache(maxsize=16)
def _keys(count: int, stream: int, device: torch.device) -> torch.Tensor:
    """Odd keys int64 [count], fixed for all time. Source: SplitMix64, Steele, Lea and Flood 2014 (its finalizer)."""
    x = (torch.arange(count, device=device) + (stream << 32)) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return (x ^ _shift(x, 31)) | 1


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right of 64-bit words: torch's own keeps the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


_COMPUTE: dict[str, Callable[[torch.Tensor], str]] = {"sha256": _of_host_bytes, "sum64": _sum64}
