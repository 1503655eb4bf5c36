"""The two kinds of attention. Both take flat tokens and a SequenceLayout; there is no path that ignores it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.data.layout import SequenceLayout
from posttrain.kernels.lightning.chunked import lightning_attention as chunked_attention
from posttrain.kernels.lightning.chunked import lightning_decode_step
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
        self.norm = RMSNorm(inner, config.lightning_norm_eps)
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
        qkv = F.silu(self.qkv_proj(x)).view(-1, self.num_heads, 3 * self.head_dim)
        return self.out_proj(torch.sigmoid(self.output_gate(x)) * self.norm(self.attend(qkv, layout, cache).flatten(1)))

    def attend(self, qkv: torch.Tensor, layout: SequenceLayout, cache: HybridCache | None = None) -> torch.Tensor:
        """The attention alone: every head's q, k and v side by side, [T, H, 3 D] -> [T, H, D]."""
        with full_precision(qkv):  # autocast would take the state and its products down to bf16
            return (self._attend_on_gpu if qkv.is_cuda else self._attend_on_host)(qkv, layout, cache)

    def _attend_on_gpu(self, qkv: torch.Tensor, layout: SequenceLayout, cache: HybridCache | None) -> torch.Tensor:
        """By the operator, which learns no length from the device."""
        slopes = self.slopes(qkv)
        if cache is None:
            return lightning_attention_qkv(qkv, slopes, cu_seqlens=layout.cu_seqlens)
        q, k, v = qkv.split(self.head_dim, dim=-1)
        if layout.max_length == 1 and min(layout.lengths) == 1:
            return lightning_decode(q, k, v, slopes, cache.states[self.layer])
        out, state = lightning_attention(
            q, k, v, slopes, cu_seqlens=layout.cu_seqlens, initial_state=cache.states[self.layer], output_final_state=True
        )
        assert state is not None
        cache.states[self.layer] = state
        return out

    def _attend_on_host(self, qkv: torch.Tensor, layout: SequenceLayout, cache: HybridCache | None) -> torch.Tensor:
        """By the chunked path, which takes the lengths from the host and keeps its plan from layer to layer."""
        q, k, v = qkv.split(self.head_dim, dim=-1)
        slopes = self.slopes(qkv)
        if cache is None:
            return chunked_attention(q, k, v, slopes, lengths=layout.lengths)[0]
        if layout.max_length == 1 and min(layout.lengths) == 1:
            return lightning_decode_step(q, k, v, slopes, cache.states[self.layer])
        out, state = chunked_attention(
            q, k, v, slopes, lengths=layout.lengths, initial_state=cache.states[self.layer], output_final_state=True
        )
        assert state is not None
        cache.states[self.layer] = state
        return out


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


def _packed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    """Attention inside each document, [T, heads, head_dim]; documents of similar length share one padded call.

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
