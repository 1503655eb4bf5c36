"""The two kinds of attention. Both take flat tokens and a SequenceLayout; there is no path that ignores it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.data.layout import SequenceLayout
from posttrain.kernels.lightning.chunked import lightning_attention as chunked_attention
from posttrain.kernels.lightning.chunked import lightning_decode_step
from posttrain.kernels.lightning.gated_norm import gated_rms_norm
from posttrain.kernels.lightning.operator import lightning_attention, lightning_attention_qkv, lightning_decode
from posttrain.model.cache import HybridCache
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.layers import RMSNorm, compute_dtype, full_precision, lightning_slopes, rotate


class LightningAttention(GradientCheckpointingLayer):
    """y = W_out(sigmoid(W_gate x) * RMSNorm_{all heads}(lightning(SiLU(W_qkv x)))).

    The projection's rows are interleaved per head, [q_h | k_h | v_h], as in the released checkpoint. No rotary
    embedding, no 1/sqrt(d). Slopes are derived from the layer's index, never stored and never cast with the model.

    Source: MiniMax-01 paper section 2.2 and the released modelling code.
    """

    def __init__(self, config: MiniMaxText01Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        inner = self.num_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.output_gate = nn.Linear(config.hidden_size, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.norm = GatedRMSNorm(inner, config.lightning_norm_eps)
        self._rates = lightning_slopes(self.num_heads, layer, config.num_hidden_layers)
        self._slopes: torch.Tensor | None = None

    def slopes(self, like: torch.Tensor) -> torch.Tensor:
        """Decay rates [H] on the device of `like`, fp32 (fp64 for fp64 input). A plain attribute: no cast reaches it."""
        dtype = compute_dtype(like)
        if self._slopes is None or self._slopes.device != like.device or self._slopes.dtype != dtype:
            self._slopes = torch.tensor(self._rates, dtype=dtype, device=like.device)
        return self._slopes

    def forward(self, x: torch.Tensor, layout: SequenceLayout, cache: HybridCache | None = None) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]; with a cache, document n continues row n and the row's state moves on."""
        qkv = self.qkv_proj(x).view(-1, self.num_heads, 3 * self.head_dim)
        gate = self.output_gate(x)
        return self.out_proj(self.norm(self.attend(qkv, layout, cache).flatten(1), gate))

    def attend(self, qkv: torch.Tensor, layout: SequenceLayout, cache: HybridCache | None = None) -> torch.Tensor:
        """SiLU and the attention: every head's q, k and v side by side, before SiLU, [T, H, 3 D] -> [T, H, D]."""
        with full_precision(qkv):  # autocast would take the state and its products down to bf16
            if cache is None:
                return self._whole(qkv, layout)
            states = cache.states[self.layer]
            if layout.max_length == 1 and min(layout.lengths) == 1:
                return self._step(qkv, states)
            out, state = self._continued(qkv, states, layout)
            assert state is not None
            cache.states[self.layer] = state
            return out

    # On a GPU by the operators, which learn no length from the device and apply SiLU themselves. On a CPU by the chunked path,
    # which takes the lengths from the host and keeps its plan from layer to layer.

    def _whole(self, qkv: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """Documents that begin with zero states."""
        slopes = self.slopes(qkv)
        if qkv.is_cuda:
            return lightning_attention_qkv(qkv, slopes, cu_seqlens=layout.cu_seqlens, activation="silu")
        return chunked_attention(*self._parts(F.silu(qkv)), slopes, lengths=layout.lengths)[0]

    def _step(self, qkv: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """One token for every row; states [B, H, D, D] move on in place."""
        slopes = self.slopes(qkv)
        if qkv.is_cuda:
            return lightning_decode(*self._parts(qkv), slopes, states, activation="silu")
        return lightning_decode_step(*self._parts(F.silu(qkv)), slopes, states)

    def _continued(
        self, qkv: torch.Tensor, states: torch.Tensor, layout: SequenceLayout
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Documents that go on from their rows' states, and the states after them."""
        q, k, v = self._parts(F.silu(qkv))
        slopes = self.slopes(qkv)
        if qkv.is_cuda:
            return lightning_attention(
                q, k, v, slopes, cu_seqlens=layout.cu_seqlens, initial_state=states, output_final_state=True
            )
        return chunked_attention(q, k, v, slopes, lengths=layout.lengths, initial_state=states, output_final_state=True)

    def _parts(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as views."""
        q, k, v = qkv.split(self.head_dim, dim=-1)
        return q, k, v


class GatedRMSNorm(RMSNorm):
    """sigmoid(gate) * RMSNorm(x) over all heads: one kernel on a GPU, `RMSNorm` and torch's product elsewhere."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """[T, W] and the gate before its sigmoid [T, W] -> [T, W]."""
        if x.is_cuda:
            return gated_rms_norm(x, gate, self.weight, self.eps)
        return torch.sigmoid(gate) * super().forward(x)


class SoftmaxAttention(GradientCheckpointingLayer):
    """Causal softmax attention with grouped keys and values; the first `rotary_dim` dimensions of a head are rotated."""

    def __init__(self, config: MiniMaxText01Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, layout: SequenceLayout, rotary: tuple[torch.Tensor, torch.Tensor], cache: HybridCache | None = None
    ) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]; with a cache, document n continues row n."""
        q = rotate(self.q_proj(x).view(-1, self.num_heads, self.head_dim), *rotary)
        k = rotate(self.k_proj(x).view(-1, self.num_kv_heads, self.head_dim), *rotary)
        v = self.v_proj(x).view(-1, self.num_kv_heads, self.head_dim)
        out = _packed_attention(q, k, v, layout) if cache is None else self._cached(q, k, v, layout, cache)
        return self.o_proj(out.flatten(1))

    def _cached(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, cache: HybridCache
    ) -> torch.Tensor:
        """Append keys and values to the cache rows, then attend to all that each row holds."""
        if layout.max_length == 1 and len(set(cache.lengths)) == 1 and min(layout.lengths) == 1:
            return self._step(q, k, v, cache)
        past = torch.tensor(cache.lengths, device=q.device)
        rows, position = layout.document_ids, layout.position_ids + past[layout.document_ids]
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        q, k, v = (part.to(keys.dtype) for part in (q, k, v))  # autocast may have made them narrower than the cache
        keys[rows, :, position] = k
        values[rows, :, position] = v
        if not any(cache.lengths):
            return _packed_attention(q, k, v, layout)
        span = max(have + new for have, new in zip(cache.lengths, layout.lengths, strict=True))
        index = layout.position_ids
        padded_q = q.new_zeros(cache.batch_size, layout.max_length, *q.shape[1:])
        padded_q[rows, index] = q
        limit = past[:, None] + torch.arange(layout.max_length, device=q.device)
        visible = torch.arange(span, device=q.device) <= limit[..., None]
        out = F.scaled_dot_product_attention(
            padded_q.transpose(1, 2), keys[:, :, :span], values[:, :, :span], attn_mask=visible[:, None], enable_gqa=True
        )
        return out.transpose(1, 2)[rows, index]

    def _step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: HybridCache) -> torch.Tensor:
        """One token for each of rows of equal length: no mask and no index tensors."""
        keys, values, past = cache.keys[self.layer], cache.values[self.layer], cache.lengths[0]
        keys[:, :, past], values[:, :, past] = k, v
        span = slice(past + 1)
        query = q.to(keys.dtype).unsqueeze(2)
        return F.scaled_dot_product_attention(query, keys[:, :, span], values[:, :, span], enable_gqa=True).squeeze(2)


_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch 2.11 takes fewer heads of keys without being told."""


def _packed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """Attention inside each document, [T, heads, head_dim]."""
    flash = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    if q.is_cuda and flash and layout.total:
        # One kernel for all lengths. Padded calls have shapes that are new in every batch, and cuDNN plans each for 25 ms.
        ends, longest = layout.cu_seqlens.to(torch.int32), layout.max_length
        out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **_GROUPED)
        assert isinstance(out, torch.Tensor)  # a pair only when asked for
        return out
    return _bucketed_attention(q, k, v, layout)


def _bucketed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """`_packed_attention` where documents of similar length share one padded call.

    Buckets are powers of two, so that a batch of many short and few long documents pads at most half of itself.
    """
    buckets: dict[int, list[int]] = {}
    for document, length in enumerate(layout.lengths):
        if length:
            buckets.setdefault(max(8, 1 << (length - 1).bit_length()), []).append(document)
    if len(buckets) == 1 and len(set(layout.lengths)) == 1:
        return _causal(*(x.view(layout.num_documents, -1, *x.shape[1:]) for x in (q, k, v))).reshape(q.shape)
    starts = torch.tensor(layout.lengths, dtype=torch.int64).cumsum(0) - torch.tensor(layout.lengths, dtype=torch.int64)
    pieces, places = [], []
    for documents in buckets.values():
        lengths = torch.tensor([layout.lengths[d] for d in documents])
        offset = torch.arange(int(lengths.max()))
        inside = (offset[None] < lengths[:, None]).to(q.device)
        # Padded rows repeat the document's last token: they lie behind every real query, so the causal mask hides them.
        token = (starts[documents][:, None] + torch.minimum(offset[None], lengths[:, None] - 1)).to(q.device)
        pieces.append(_causal(q[token], k[token], v[token])[inside])
        places.append(token[inside])
    order = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64, device=q.device)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=q.device)
    return torch.cat(pieces)[inverse] if pieces else q


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[N, L, heads, d] -> [N, L, heads, d], causal, scale 1/sqrt(d)."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)
