"""Steps of an inference server: made, run, and computed in fp64 sequence by sequence and token by token; needs no pytest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from posttrain.kernels.lightning.reference import recurrent_lightning_attention
from posttrain.kernels.lightning.serving import lightning_mixed, lightning_verify

Result = tuple[torch.Tensor, torch.Tensor]
"""Outputs, and the pool after the step."""
SLOPES = (0.9, 0.01)


@dataclass(frozen=True)
class Verification:
    """Drafts [B, R, H, D], pending tokens [B, R', H, D], counts, a pool whose other slots are NaN, and slots."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pending_k: torch.Tensor
    pending_v: torch.Tensor
    accepted: torch.Tensor
    slopes: torch.Tensor
    pool: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def make(
        cls,
        drafts: int,
        accepted: Sequence[int],
        slots: Sequence[int],
        pending: int,
        *,
        slopes: Sequence[float] = SLOPES,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        seed: int = 0,
    ) -> Verification:
        """Random numbers; rejected pending tokens are NaN."""
        draw = _Draw(dtype, device, seed)
        batch, heads = len(accepted), len(slopes)
        q, k, v = (draw(batch, drafts, heads, head_dim).to(dtype) for _ in range(3))
        pending_k, pending_v = (draw(batch, pending, heads, head_dim).to(dtype) for _ in range(2))
        for sequence, count in enumerate(accepted):
            for x in (pending_k, pending_v):
                x[sequence, min(max(count, 0), pending) :] = torch.nan
        counts = torch.tensor(accepted, dtype=torch.int32, device=device)
        places = torch.tensor(slots, dtype=torch.int64, device=device)
        rates = torch.tensor(slopes, dtype=draw.compute, device=device)
        return cls(q, k, v, pending_k, pending_v, counts, rates, draw.pool(slots, heads, head_dim), places)

    def run(self, backend: str) -> Result:
        """By `lightning_verify`, on a copy of the pool."""
        pool = self.pool.clone()
        return self.on(pool, backend), pool

    def on(self, pool: torch.Tensor, backend: str, slots: bool = True) -> torch.Tensor:
        """Outputs, with `pool` moved on."""
        return lightning_verify(
            *(self.q, self.k, self.v, self.slopes, pool, self.pending_k, self.pending_v, self.accepted),
            state_slots=self.slots if slots else None,
            backend=backend,
        )

    def exact(self) -> Result:
        """In fp64, from the recurrence."""
        out = torch.zeros(self.v.shape, dtype=torch.float64, device=self.v.device)
        pool = self.pool.double().clone()
        for sequence, slot in enumerate(self.slots.tolist()):
            if slot < 0:
                continue
            count = min(max(int(self.accepted[sequence]), 0), self.pending_k.shape[1])
            keys, values = self.pending_k[sequence, :count], self.pending_v[sequence, :count]
            _, pool[slot] = recurrent(keys, keys, values, self.slopes, pool[slot])
            out[sequence], _ = recurrent(self.q[sequence], self.k[sequence], self.v[sequence], self.slopes, pool[slot])
        return out, pool


@dataclass(frozen=True)
class Mixed:
    """Tokens [T, H, D] of decodes and of prefills of `lengths`, a pool whose other slots are NaN, and slots."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slopes: torch.Tensor
    pool: torch.Tensor
    slots: tuple[int, ...]
    decodes: int
    lengths: tuple[int, ...]

    @classmethod
    def make(
        cls,
        decodes: int,
        lengths: Sequence[int],
        slots: Sequence[int],
        *,
        slopes: Sequence[float] = SLOPES,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        seed: int = 0,
    ) -> Mixed:
        """Random numbers, q, k and v out of one interleaved tensor."""
        draw = _Draw(dtype, device, seed)
        heads = len(slopes)
        q, k, v = draw(decodes + sum(lengths), heads, 3 * head_dim).to(dtype).chunk(3, dim=-1)
        rates = torch.tensor(slopes, dtype=draw.compute, device=device)
        return cls(q, k, v, rates, draw.pool(slots, heads, head_dim), tuple(slots), decodes, tuple(lengths))

    def run(self, backend: str, max_length: int | None = None) -> Result:
        """By `lightning_mixed`, on a copy of the pool."""
        pool = self.pool.clone()
        return self.stepper(pool, backend, max_length)(), pool

    def stepper(self, pool: torch.Tensor, backend: str, max_length: int | None = None) -> Callable[[], torch.Tensor]:
        """A function of no argument that moves `pool` on, as a graph captures it."""
        device = self.v.device
        slots = torch.tensor(self.slots, dtype=torch.int32, device=device)
        offsets = torch.tensor([self.decodes, *self.lengths], device=device).cumsum(0).int() if self.lengths else None
        return lambda: lightning_mixed(
            *(self.q, self.k, self.v, self.slopes, pool),
            num_decodes=self.decodes,
            state_slots=slots,
            cu_seqlens=offsets,
            max_length=max_length,
            backend=backend,
        )

    def exact(self) -> Result:
        """In fp64, from the recurrence; -1 is a decode of zeros, or a prefill that begins with zeros."""
        out = torch.zeros(self.v.shape, dtype=torch.float64, device=self.v.device)
        pool, start = self.pool.double().clone(), 0
        for place, (slot, length) in enumerate(zip(self.slots, (1,) * self.decodes + self.lengths, strict=True)):
            rows = slice(start, start + length)
            start += length
            if slot < 0 and place < self.decodes:
                continue
            state = pool[slot] if slot >= 0 else torch.zeros_like(pool[0])
            out[rows], state = recurrent(self.q[rows], self.k[rows], self.v[rows], self.slopes, state)
            if slot >= 0:
                pool[slot] = state
        return out, pool


def recurrent(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, state: torch.Tensor) -> Result:
    """Outputs [T, H, D] and the state [H, D, D] of one sequence, in fp64."""
    offsets = torch.tensor([0, len(v)])
    out, states = recurrent_lightning_attention(
        *(q.double(), k.double(), v.double(), slopes.double()), cu_seqlens=offsets, initial_state=state[None]
    )
    return out, states[0]


def poisoned_empty() -> Callable[..., torch.Tensor]:
    """What torch.empty does, with NaN instead of nothing in particular."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        made = real(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() and not made.requires_grad else made

    return empty


class _Draw:
    """Normal numbers of one seed, in the compute type of `dtype`."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def __call__(self, *shape: int, spread: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.generator.device, dtype=self.compute) * spread

    def pool(self, slots: Sequence[int], heads: int, head_dim: int) -> torch.Tensor:
        """States in `slots`, NaN in others, of which there are at least two."""
        shape = (max((0, *slots)) + 3, heads, head_dim, head_dim)
        pool = torch.full(shape, torch.nan, device=self.generator.device, dtype=self.compute)
        for slot in slots:
            if slot >= 0:
                pool[slot] = self(*shape[1:], spread=1.0)
        return pool
