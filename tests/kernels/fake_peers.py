"""Stand-ins for libraries that are not installed: their names and arguments, computed by the fp64 recurrence."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from posttrain.kernels.lightning.reference import recurrent_lightning_attention


def attend(q, k, v, rates):
    """[B, T, H, D] -> [B, T, H, D]."""
    shape, dtype = v.shape, v.dtype
    offsets = torch.arange(q.shape[0] + 1) * q.shape[1]
    q, k, v = (x.flatten(0, 1).double() for x in (q, k, v))
    out, _ = recurrent_lightning_attention(q, k, v, rates.double(), cu_seqlens=offsets)
    return out.view(shape).to(dtype)


def chunk_simple_gla(q, k, v, *, g_gamma, scale, chunk_size):
    assert scale == 1.0 and chunk_size in (64, 128)
    return attend(q, k, v, -g_gamma), None


def fused_recurrent_simple_gla(q, k, v, *, g_gamma, scale, initial_state, output_final_state):
    """[B, 1, H, D], states [B, H, K, V]."""
    assert scale == 1.0 and output_final_state
    state = initial_state * g_gamma.exp().view(1, -1, 1, 1) + k[:, 0, :, :, None].float() * v[:, 0, :, None, :].float()
    return (q[:, 0, :, None, :].float() @ state).transpose(1, 2).to(v.dtype), state


def lightning_attention(q, k, v, ed):
    """[B, H, T, D], fp32."""
    assert q.dtype == torch.float32
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), ed)
    return out.transpose(1, 2), None


def linear_decode_forward_triton(q, k, v, kv_caches, slope_rate, slot_idx):
    """[B, H, 1, D] -> [B, H * D], states [S, H, K, V] in place."""
    states = kv_caches[slot_idx] * (-slope_rate).exp().view(1, -1, 1, 1) + k.float().transpose(2, 3) * v.float()
    kv_caches[slot_idx] = states
    return (q.float() @ states).to(v.dtype).flatten(1)


def lightning_attn_func(q, k, v, s):
    """[B, H, T, D], rates [1, H, 1, 1]."""
    assert s.shape[0] == s.shape[2] == s.shape[3] == 1
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), s.flatten()).transpose(1, 2)


PLACES = {
    "fla.ops.simple_gla": (chunk_simple_gla, fused_recurrent_simple_gla),
    "vllm.model_executor.layers.lightning_attn": (lightning_attention, linear_decode_forward_triton),
    "lightning_attn.ops": (lightning_attn_func,),
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins where the adapters look."""
    for place, functions in PLACES.items():
        module = ModuleType(place)
        for function in functions:
            setattr(module, function.__name__, function)
        parts = place.split(".")
        for count in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:count]), ModuleType(parts[count - 1]))
        monkeypatch.setitem(sys.modules, place, module)


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no peer were installed."""
    for place in PLACES:
        monkeypatch.setitem(sys.modules, place.split(".")[0], None)
