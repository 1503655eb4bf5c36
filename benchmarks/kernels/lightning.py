"""Lightning attention on one GPU: ours against the floor and against what else is installed, in one process.

    python -m benchmarks.kernels.lightning [FOLDER]

The floor is the bytes that must move over the bandwidth of a copy measured in the same run: q, k and v read and o written once
(forward), and two more sweeps, k, v, do -> dq and q, k, v, do -> dk, dv (backward). Medians with a cold L2, random bf16 data,
views of an interleaved projection, slopes of the first layer. Writes lightning.json to FOLDER (default: benchmarks/results).
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from benchmarks.record import write_record
from posttrain.kernels.lightning.operator import lightning_attention_qkv, lightning_decode

HEAD_DIM = 128
SHAPES = ((1, 8192, 64), (1, 32768, 64), (1, 131072, 64), (8, 4096, 64), (1, 8192, 8), (1, 32768, 8), (1, 131072, 8))
"""Documents, tokens of each, heads."""
LONGEST = (1, 524288, 64)
TRAINED = 131072  # tokens up to which the backward pass is timed
PACKED = (64, 65536)
DECODED = (1, 4, 16, 64, 256)
FORWARD_BYTES, BACKWARD_BYTES = 8 * HEAD_DIM, 20 * HEAD_DIM
Inputs = tuple[torch.Tensor, torch.Tensor]


def milliseconds(run: Callable[[], Any], repeat: int = 60) -> float:
    """Median of one call."""
    return float(do_bench(run, warmup=20, rep=repeat, return_mode="median"))


def in_graph(run: Callable[[], Any], inner: int) -> float:
    """Median milliseconds of one of `inner` calls that `run` makes, replayed in a CUDA graph: the device's time alone."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay, 30) / inner


def copy_bandwidth() -> float:
    """Bytes a millisecond of a device-to-device copy of 1 GiB, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def inputs(tokens: int, heads: int) -> Inputs:
    """qkv [T, H, 3 D] and slopes [H]."""
    qkv = torch.randn(tokens, heads, 3 * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return qkv, torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device="cuda")


def batch(qkv: torch.Tensor, documents: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, T, H, D] as views."""
    q, k, v = qkv.view(documents, -1, *qkv.shape[1:]).chunk(3, dim=-1)
    return q, k, v


def ours(qkv: torch.Tensor, slopes: torch.Tensor, documents: int, backend: str = "triton") -> Callable[[], torch.Tensor]:
    """The operator of the projection's output, with the gradient in the same layout."""
    whole = qkv.view(documents, -1, *qkv.shape[1:])
    return lambda: lightning_attention_qkv(whole, slopes, backend=backend)


def fla(qkv: torch.Tensor, slopes: torch.Tensor, documents: int) -> Callable[[], torch.Tensor]:
    """FLA's operator of the same function; its `chunk_lightning_attn` has another decay."""
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    q, k, v = batch(qkv, documents)
    return lambda: chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=1.0)[0]


def lightning_attn2(qkv: torch.Tensor, slopes: torch.Tensor, documents: int) -> Callable[[], torch.Tensor]:
    """OpenNLPLab's operator, which takes [B, H, T, D] dense: the copies are not timed."""
    function = importlib.import_module("lightning_attn.ops").lightning_attn_func
    q, k, v = (x.transpose(1, 2).contiguous() for x in batch(qkv, documents))
    rates = slopes.view(1, -1, 1, 1)
    return lambda: function(q, k, v, rates)


PEERS = {"fla chunk_simple_gla": fla, "lightning_attn2": lightning_attn2}


def timed(build: Callable[[], Callable[[], torch.Tensor]], qkv: torch.Tensor, train: bool) -> dict[str, Any]:
    """Milliseconds forward and forward + backward, or why there are none."""
    try:
        run = build()
        with torch.no_grad():
            result: dict[str, Any] = {"forward_ms": milliseconds(run)}
        if train:
            qkv.requires_grad_()
            build_again = build()
            grad = torch.randn_like(build_again())

            def both() -> None:
                qkv.grad = None
                build_again().backward(grad)

            result["forward_backward_ms"] = milliseconds(both)
        return result
    except ImportError as error:
        return {"absent": str(error)}
    except (RuntimeError, ValueError, AssertionError) as error:  # an out-of-memory or a crash of a peer is a result
        return {"failed": str(error).splitlines()[0][:200]}
    finally:
        qkv.requires_grad_(False)
        qkv.grad = None
        torch.cuda.empty_cache()


def attention(bandwidth: float, shape: tuple[int, int, int]) -> dict[str, Any]:
    """One row: the floors, ours, the matmul path, and the peers."""
    documents, length, heads = shape
    tokens = documents * length
    qkv, slopes = inputs(tokens, heads)
    train = tokens <= TRAINED
    row: dict[str, Any] = {
        "documents": documents,
        "tokens": length,
        "heads": heads,
        "forward_floor_ms": tokens * heads * FORWARD_BYTES / bandwidth,
        "forward_backward_floor_ms": tokens * heads * (FORWARD_BYTES + BACKWARD_BYTES) / bandwidth,
        "ours": timed(lambda: ours(qkv, slopes, documents), qkv, train),
    }
    if tokens <= 8192:
        row["matmul"] = timed(lambda: ours(qkv, slopes, documents, "matmul"), qkv, train)
        with torch.no_grad():
            row["ours in a graph"] = {"forward_ms": in_graph(ours(qkv, slopes, documents), 1)}
    for name, peer in PEERS.items():
        row[name] = timed(lambda peer=peer: peer(qkv, slopes, documents), qkv, train)  # type: ignore[misc]
    return row


def packed() -> dict[str, float]:
    """Many packed documents of random lengths against one document of their sum."""
    documents, tokens = PACKED
    qkv, slopes = inputs(tokens, 64)
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[: documents - 1].add(1).sort().values
    offsets = torch.cat([torch.zeros(1), cuts, torch.full((1,), tokens)]).to("cuda", torch.int32)

    def run() -> torch.Tensor:
        return lightning_attention_qkv(qkv, slopes, cu_seqlens=offsets, backend="triton")

    many, one = timed(lambda: run, qkv, True), timed(lambda: ours(qkv, slopes, 1), qkv, True)
    return {f"{name} {key}": value for name, found in (("packed", many), ("one", one)) for key, value in found.items()}


def decoding(bandwidth: float) -> Iterator[dict[str, float]]:
    """One token for each of B sequences, in a graph, going round through states that do not fit in the L2."""
    heads = 64
    slopes = inputs(1, heads)[1]
    for size in DECODED:
        rounds = max(1, min(64, 512 // size))
        pool = torch.randn(size * rounds, heads, HEAD_DIM, HEAD_DIM, device="cuda")
        q, k, v = (torch.randn(size, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        slots = torch.arange(size * rounds, device="cuda").view(rounds, size)

        def run(q=q, k=k, v=v, pool=pool, slots=slots) -> None:  # type: ignore[no-untyped-def]
            for places in slots:
                lightning_decode(q, k, v, slopes, pool, state_slots=places, backend="triton")

        moved = size * heads * HEAD_DIM * HEAD_DIM * 8
        yield {"batch": size, "ours_ms": in_graph(run, rounds), "floor_ms": moved / bandwidth}


def longest_training() -> dict[str, Any]:
    """Forward and backward of 1,048,576 tokens: runs, and memory beyond inputs, outputs and gradients, in GiB."""
    tokens, heads = 1 << 20, 8
    qkv, slopes = inputs(tokens, heads)
    grad = torch.randn(tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    qkv.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = lightning_attention_qkv(qkv, slopes, backend="triton")
    out.backward(grad)
    known = out.nbytes + qkv.nbytes
    return {"tokens": tokens, "heads": heads, "extra_gib": (torch.cuda.max_memory_allocated() - before - known) / 2**30}


def main() -> None:
    """Runs everything and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {"copy_gb_per_s": bandwidth / 1e6, "attention": []}
    for shape in (*SHAPES, LONGEST):
        results["attention"].append(attention(bandwidth, shape))
        print(results["attention"][-1], flush=True)
    with torch.no_grad():
        results["decode"] = list(decoding(bandwidth))
    results |= {"packed_64": packed(), "million_tokens": longest_training()}
    print({name: results[name] for name in ("copy_gb_per_s", "decode", "packed_64", "million_tokens")})
    print(write_record("lightning", results, folder))


if __name__ == "__main__":
    main()
