"""Softmax attention in vLLM: grouped keys and values, the leading part of each head rotated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.layers import rotate


class SoftmaxAttention(nn.Module):
    """The same as `posttrain.model.attention.SoftmaxAttention`; q, k and v are one parameter, `qkv_proj`."""

    def __init__(self, config: MiniMaxText01Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if heads % ranks:
            raise ValueError(f"{heads} attention heads cannot be shared by {ranks} tensor-parallel ranks")
        if max(kv_heads, ranks) % min(kv_heads, ranks):
            raise ValueError(f"{kv_heads} key/value heads cannot be shared by {ranks} tensor-parallel ranks")
        self.heads, self.kv_heads, self.width = heads // ranks, max(1, kv_heads // ranks), width
        quant = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, width, heads, kv_heads, bias=False, quant_config=quant, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            heads * width, config.hidden_size, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        self.padding = _kernel_width(width) - width
        self.attn = Attention(
            self.heads,
            width + self.padding,
            width**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]; `rotary` is `rotary_tables`'s."""
        qkv, _ = self.qkv_proj(x)
        parts = qkv.split([count * self.width for count in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q, k, v = (part.view(len(part), -1, self.width) for part in parts)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        # Zeros change no product of q and k; what they add to the output is cut off.
        q, k, v = (F.pad(part, (0, self.padding)).flatten(1) for part in (q, k, v))
        out = self.attn(q, k, v).view(len(x), self.heads, -1)[..., : self.width]
        return self.o_proj(out.reshape(len(x), -1))[0]


def rotary_tables(positions: torch.Tensor, rotary_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [T, rotary_dim / 2], of angles in fp64 (`posttrain.model.layers.rotary_tables`).

    That function remembers its frequencies, which torch.compile does not trace.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device) / rotary_dim
    angle = positions.to(torch.float64)[:, None] * theta**-exponent
    return angle.cos().float(), angle.sin().float()


def _kernel_width(width: int) -> int:
    """The width of heads that attention runs on: vLLM's on the CPU knows few, the next larger one is taken."""
    if not current_platform.is_cpu():
        return width
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= width]
    if not known:
        raise ValueError(f"vLLM's attention on the CPU has no heads of {width}")
    return min(known)
