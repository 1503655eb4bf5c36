"""Rows of serving: decoding, verification of draft tokens, decodes and short prefills in one batch.

States take turns, so that none of them is still in the L2 when its turn comes again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from posttrain.kernels.bench.peers import STEPS
from posttrain.kernels.bench.rows import FORWARD_BYTES, HEAD_DIM, OURS, STATE_BYTES, Row, backend_of, normal, slopes_of
from posttrain.kernels.bench.timing import Prepared
from posttrain.kernels.lightning.operator import lightning_decode
from posttrain.kernels.lightning.serving import lightning_mixed, lightning_verify

BATCHES = (1, 4, 16, 64, 256)
HELD_STATES = 512  # states that take turns, 2 GiB with 64 heads
MOST_ROUNDS = 64
DRAFTS, VERIFIED = 4, 64
DECODES, PREFILLS, PREFILL_TOKENS = 18, 2, 50
ONE_TOKEN, PREFILLS_ALONE, DECODES_ALONE = "decoding one token", "prefills alone", "decodes alone"


def rows() -> list[Row]:
    """Every row of the groups `decode`, `verify` and `mixed`."""
    found = [_decode_row("decode", f"{size} sequences", size, (OURS, *STEPS)) for size in BATCHES]
    found.append(_decode_row("verify", f"{VERIFIED} sequences, {DRAFTS} tokens", VERIFIED, (OURS, ONE_TOKEN)))
    mixed = DECODES + PREFILLS * PREFILL_TOKENS
    found.append(
        Row(
            group="mixed",
            case=f"{DECODES} decodes and {PREFILLS} prefills of {PREFILL_TOKENS}",
            contestants=(OURS, PREFILLS_ALONE, DECODES_ALONE),
            floor_bytes=64 * ((DECODES + PREFILLS) * STATE_BYTES + mixed * FORWARD_BYTES),
            documents=DECODES + PREFILLS,
            tokens=mixed,
            baseline=PREFILLS_ALONE,
        )
    )
    return found


def prepare(row: Row, contestant: str, device: str) -> Prepared:
    """A contestant with inputs of its own; equal seeds give equal numbers to all.

    Raises:
        ImportError: the contestant is not installed.
    """
    rounds = max(1, min(MOST_ROUNDS, HELD_STATES // row.documents))
    shape = (rounds * row.documents, row.heads, HEAD_DIM, HEAD_DIM)
    pool = torch.randn(shape, device=device)
    slots = torch.arange(len(pool), device=device).view(rounds, row.documents)
    if row.group == "mixed":
        return _in_turns(_mixed(row, contestant, pool, device), slots)
    if contestant == OURS and row.group == "verify":
        return _in_turns(_verify(row, pool, device), slots)
    q, k, v = (normal(row.documents, row.heads, HEAD_DIM, device=device) for _ in range(3))
    slopes = slopes_of(row.heads, device)
    if contestant in (OURS, ONE_TOKEN):
        return _in_turns(_decode(q, k, v, slopes, pool, device), slots)
    step = STEPS[contestant](slopes)
    states = pool.transpose(2, 3).contiguous().view(rounds, row.documents, *shape[1:])
    places = slots[0]

    def run() -> None:
        for held in states:
            step(q, k, v, held, places)

    return Prepared(run, rounds, lambda: step(q, k, v, states[0], places))


def _decode_row(group: str, case: str, size: int, contestants: tuple[str, ...]) -> Row:
    return Row(
        group=group,
        case=case,
        contestants=contestants,
        floor_bytes=size * 64 * STATE_BYTES,
        documents=size,
        baseline=ONE_TOKEN if ONE_TOKEN in contestants else None,
        compared=group == "decode",
    )


def _in_turns(call: Callable[[torch.Tensor], torch.Tensor], slots: torch.Tensor) -> Prepared:
    """`call` on one row of slots [R, N] after the other."""

    def run() -> None:
        for places in slots:
            call(places)

    return Prepared(run, len(slots), lambda: call(slots[0]))


def _decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, pool: torch.Tensor, device: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    backend = backend_of(device)
    return lambda places: lightning_decode(q, k, v, slopes, pool, state_slots=places, backend=backend)


def _verify(row: Row, pool: torch.Tensor, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """As many tokens pending as drafts, all accepted: the most work that a call can have."""
    shape = (row.documents, DRAFTS, row.heads, HEAD_DIM)
    q, k, v, pending_k, pending_v = (normal(*shape, device=device) for _ in range(5))
    slopes = slopes_of(row.heads, device)
    accepted = torch.full((row.documents,), DRAFTS, dtype=torch.int32, device=device)
    options: dict[str, Any] = {"backend": backend_of(device)}
    return lambda places: lightning_verify(q, k, v, slopes, pool, pending_k, pending_v, accepted, state_slots=places, **options)


def _mixed(row: Row, contestant: str, pool: torch.Tensor, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """All of a batch, or one of its kinds alone; every sequence continues a state."""
    q, k, v = (normal(row.tokens, row.heads, HEAD_DIM, device=device) for _ in range(3))
    slopes, backend = slopes_of(row.heads, device), backend_of(device)
    offsets = torch.arange(PREFILLS + 1, dtype=torch.int32, device=device) * PREFILL_TOKENS
    packed: dict[str, Any] = {"cu_seqlens": offsets, "max_length": PREFILL_TOKENS, "backend": backend}
    first = q[:DECODES], k[:DECODES], v[:DECODES]
    rest = q[DECODES:], k[DECODES:], v[DECODES:]

    def mixed(places: torch.Tensor) -> torch.Tensor:
        return lightning_mixed(q, k, v, slopes, pool, num_decodes=DECODES, state_slots=places, **packed)

    def prefills(places: torch.Tensor) -> torch.Tensor:
        return lightning_mixed(*rest, slopes, pool, num_decodes=0, state_slots=places[DECODES:], **packed)

    def decodes(places: torch.Tensor) -> torch.Tensor:
        return lightning_decode(*first, slopes, pool, state_slots=places[:DECODES], backend=backend)

    return {OURS: mixed, PREFILLS_ALONE: prefills, DECODES_ALONE: decodes}[contestant]
