"""What a user would take instead: adapters that import a peer when it is first called.

Each gets dense tensors of its own in the layout that it wants; copies into that layout are not timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """One operator of another library.

    Attributes:
        make: slopes [H] -> a function of q, k, v.
        heads_first: takes [B, H, T, D], not [B, T, H, D].
        trains: has a backward pass.
        tuned: chooses its configuration by trying them, whatever the number of tokens.
        dtype: of its inputs.
    """

    make: Callable[[torch.Tensor], Attention]
    heads_first: bool = False
    trains: bool = True
    tuned: bool = False
    dtype: torch.dtype = torch.bfloat16


def _fla(size: int) -> Peer:
    """`chunk_simple_gla` with a constant decay: `chunk_lightning_attn` of the same library has another one."""

    def make(slopes: torch.Tensor) -> Attention:
        from fla.ops.simple_gla import chunk_simple_gla

        decay = -slopes
        return lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=decay, scale=1.0, chunk_size=size)[0]

    return Peer(make, tuned=True)


def _vllm(slopes: torch.Tensor) -> Attention:
    """vLLM's prefill, with fp32 inputs as in vLLM; of bf16 it does not compile."""
    from vllm.model_executor.layers.lightning_attn import lightning_attention

    return lambda q, k, v: lightning_attention(q, k, v, slopes)[0]


def _lightning_attn2(slopes: torch.Tensor) -> Attention:
    """OpenNLPLab's kernels."""
    from lightning_attn.ops import lightning_attn_func

    rates = slopes.view(1, -1, 1, 1)
    return lambda q, k, v: lightning_attn_func(q, k, v, rates)


PEERS = {
    "FLA 64": _fla(64),
    "FLA 128": _fla(128),
    "vLLM": Peer(_vllm, heads_first=True, trains=False, dtype=torch.float32),
    "lightning_attn2": Peer(_lightning_attn2, heads_first=True),
}
"""FLA with chunks of 64 (its default) and of 128."""


def _fla_step(slopes: torch.Tensor) -> Step:
    """FLA keeps no pool: a step takes states and returns new ones."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    decay = -slopes

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, states: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        tokens = (x.unsqueeze(1) for x in (q, k, v))
        options = {"g_gamma": decay, "scale": 1.0, "initial_state": states, "output_final_state": True}
        return fused_recurrent_simple_gla(*tokens, **options)[0].squeeze(1)

    return step


def _vllm_step(slopes: torch.Tensor) -> Step:
    """In place, as ours."""
    from vllm.model_executor.layers.lightning_attn import linear_decode_forward_triton

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        tokens = (x.unsqueeze(2) for x in (q, k, v))
        return linear_decode_forward_triton(*tokens, states, slopes, slots).view(v.shape)

    return step


STEPS: dict[str, Callable[[torch.Tensor], Step]] = {"FLA": _fla_step, "vLLM": _vllm_step}
"""Decoding: slopes -> a step of q, k, v [B, H, D], states [B, H, K, V] and their places 0, 1, ... [B]."""


def import_all() -> None:
    """Import every peer that can be; one that cannot says why when it is asked for."""
    slopes = torch.ones(1)
    for make in (*(peer.make for peer in PEERS.values()), *STEPS.values()):
        with contextlib.suppress(Exception):
            make(slopes)
