"""Rows of lightning attention over whole sequences: forward, forward and backward, packed, and the memory of the longest."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.kernels.bench.peers import PEERS, Peer
from posttrain.kernels.bench.rows import BACKWARD_BYTES, FORWARD_BYTES, HEAD_DIM, OURS, Row, backend_of, normal, slopes_of
from posttrain.kernels.bench.timing import Prepared
from posttrain.kernels.lightning.operator import lightning_attention_qkv

MANY_HEADS = ((1, 8192), (1, 32768), (1, 131072), (8, 4096))
LONGEST = (1, 524288)
FEW_HEADS = ((1, 8192), (1, 32768), (1, 131072))
"""Documents and tokens of each; few heads are what a rank of eight holds."""
PACKED = (64, 65536)
MILLION = 1 << 20
ONE_DOCUMENT = "one document"
COMPARED = 8192 * 64  # tokens times heads
GRADIENT_BYTES = 16 * HEAD_DIM  # a token of a head: qkv and output in bf16, and their gradients


def rows() -> list[Row]:
    """Every row of the groups `forward`, `train` and `packed`."""
    forward = [_row(*shape, heads=64) for shape in (*MANY_HEADS, LONGEST)]
    forward += [_row(*shape, heads=8) for shape in FEW_HEADS]
    train = [_row(*shape, heads=64, train=True) for shape in MANY_HEADS]
    # Tuning a peer's backward pass once more, for another number of heads, would take longer than all the rest.
    train += [_row(*shape, heads=8, train=True, peers=False) for shape in FEW_HEADS]
    memory = Row("train", "memory of 1,048,576 tokens", (OURS,), 0, tokens=MILLION, train=True)
    return [*forward, *train, memory, *(_packed_row(train) for train in (False, True))]


def prepare(row: Row, contestant: str, device: str) -> Prepared:
    """A contestant with inputs of its own; equal seeds give equal numbers to all.

    Raises:
        ImportError: the contestant is not installed.
    """
    if not row.floor_bytes:
        return Prepared(run=lambda: None, measure=lambda: memory_beyond(row.tokens, device))
    heads, slopes = row.heads, slopes_of(row.heads, device)
    packed = row.group == "packed"
    qkv = normal(1 if packed else row.documents, row.tokens, heads, 3 * HEAD_DIM, device=device)
    offsets = random_offsets(row.documents, row.tokens, device) if packed and contestant != ONE_DOCUMENT else None
    if contestant in (OURS, ONE_DOCUMENT):
        return _ours(row, qkv, slopes, offsets, device)
    return _peer(PEERS[contestant], row, qkv, slopes, device)


def random_offsets(documents: int, tokens: int, device: str) -> torch.Tensor:
    """Offsets [N + 1] of documents of random lengths, none empty, int32; always the same ones."""
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[: documents - 1] + 1
    return torch.cat([torch.zeros(1), cuts.sort().values, torch.full((1,), tokens)]).to(device, torch.int32)


def memory_beyond(tokens: int, device: str) -> dict[str, Any]:
    """Forward and backward of one document: peak memory beyond inputs, outputs and their gradients.

    As many heads (64, 32, 16, 8) as leave a tenth of the card.

    Returns:
        `extra_gib` and `heads`.
    """
    room = 0.9 * torch.cuda.get_device_properties(0).total_memory
    heads = next((count for count in (64, 32, 16) if count * tokens * GRADIENT_BYTES <= room), 8)
    slopes = slopes_of(heads, device)
    qkv = normal(tokens, heads, 3 * HEAD_DIM, device=device).requires_grad_()
    grad = normal(tokens, heads, HEAD_DIM, device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = lightning_attention_qkv(qkv, slopes, backend=backend_of(device))
    (found,) = torch.autograd.grad(out, qkv, grad)
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes - found.nbytes
    return {"extra_gib": extra / 2**30, "heads": heads}


def _row(documents: int, tokens: int, heads: int, train: bool = False, peers: bool = True) -> Row:
    size = documents * tokens * heads
    able = [name for name, peer in PEERS.items() if peers and (peer.trains or not train)]
    return Row(
        group="train" if train else "forward",
        case=f"{documents} x {tokens:,}, {heads} heads",
        # With few heads one peer, the fastest with many, tells enough.
        contestants=(OURS, *(name for name in able if heads == 64 or name.startswith("FLA"))),
        floor_bytes=size * (FORWARD_BYTES + BACKWARD_BYTES * train),
        documents=documents,
        tokens=tokens,
        heads=heads,
        train=train,
        compared=size <= COMPARED,
    )


def _packed_row(train: bool) -> Row:
    documents, tokens = PACKED
    return Row(
        group="packed",
        case=f"{documents} documents, {tokens:,} tokens, forward{' and backward' * train}",
        contestants=(OURS, ONE_DOCUMENT),
        floor_bytes=tokens * 64 * (FORWARD_BYTES + BACKWARD_BYTES * train),
        documents=documents,
        tokens=tokens,
        train=train,
        baseline=ONE_DOCUMENT,
    )


def _ours(row: Row, qkv: torch.Tensor, slopes: torch.Tensor, offsets: torch.Tensor | None, device: str) -> Prepared:
    """The operator of the projection's output as it lies; its gradient comes in the same layout."""
    whole = qkv.flatten(0, 1) if offsets is not None else qkv
    backend = backend_of(device)

    def forward() -> torch.Tensor:
        return lightning_attention_qkv(whole, slopes, cu_seqlens=offsets, backend=backend)

    if not row.train:
        return Prepared(forward, output=lambda: forward().view(*qkv.shape[:3], HEAD_DIM))
    whole.requires_grad_()
    grad = normal(*qkv.shape[:3], HEAD_DIM, device=device).view(*whole.shape[:-1], HEAD_DIM)

    def both() -> torch.Tensor:
        return torch.autograd.grad(forward(), whole, grad)[0]

    return Prepared(both, output=lambda: both().view(qkv.shape))


def _peer(peer: Peer, row: Row, qkv: torch.Tensor, slopes: torch.Tensor, device: str) -> Prepared:
    function = peer.make(slopes)

    def arranged(x: torch.Tensor) -> torch.Tensor:
        return (x.transpose(1, 2) if peer.heads_first else x).to(peer.dtype).contiguous()

    def back(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if peer.heads_first else x

    shape = qkv.shape
    q, k, v = (arranged(x) for x in qkv.chunk(3, dim=-1))
    del qkv
    if not row.train:
        return Prepared(lambda: function(q, k, v), output=lambda: back(function(q, k, v)))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    grad = arranged(normal(*shape[:3], HEAD_DIM, device=device))

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(q, k, v), tensors, grad)

    return Prepared(both, output=lambda: torch.cat([back(x) for x in both()], dim=-1))
