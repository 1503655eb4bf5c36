"""Lightning attention in vLLM: the recurrent state as a Mamba-like cache, decodes and prefills of a step together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed import tensor_model_parallel_all_reduce as all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.linear import minimax_linear_attn  # noqa: F401  # registers vllm::linear_attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from posttrain.kernels.lightning.chunked import lightning_attention as chunked_attention
from posttrain.kernels.lightning.chunked import lightning_decode_step
from posttrain.kernels.lightning.operator import lightning_attention, lightning_decode
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.layers import RMSNorm, lightning_slopes


@dataclass
class LightningMetadata:
    """A step's requests as one group of lightning layers sees them; decodes (one token each) come before prefills.

    Attributes:
        num_decodes, num_decode_tokens: the same but for requests without a token, which are padding and come last.
        num_tokens: of decodes and prefills; a step's tensors may have more rows, which are padding.
        lengths: tokens of each prefill, on the host.
        query_start_loc: int32 [requests + 1], where the tokens of each request begin.
        slots: int32 [requests], where each request's state lies; -1 for a padded row.
    """

    num_decodes: int
    num_decode_tokens: int
    num_tokens: int
    lengths: list[int]
    query_start_loc: torch.Tensor
    slots: torch.Tensor


class LightningMetadataBuilder(LinearAttentionMetadataBuilder):
    """Makes `LightningMetadata`, and zeroes the state of every request that has no context yet.

    A slot that a new request gets holds what the last one left, and vLLM does not clear it. A one-token prompt counts as a
    decode, so clearing in prefills alone would let it read that. It is done here since here runs in every step, also where the
    layers themselves are replayed from a CUDA graph.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        # A CUDA graph reads slots at one address; with prefix caching vLLM makes a new tensor of them every step.
        self._slots = torch.full((vllm_config.scheduler_config.max_num_seqs,), -1, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LightningMetadata:
        """See the class."""
        common = common_attn_metadata
        base = super().build(common_prefix_len, common, fast_build)
        requests = common.num_reqs
        slots = torch.where(base.seq_lens[:requests] > 0, base.state_indices_tensor[:requests], -1).to(torch.int32)
        if requests <= len(self._slots):
            self._slots[:requests].copy_(slots)
            slots = self._slots[:requests]
        lengths = common.query_start_loc_cpu[: requests + 1].diff()
        self._clear(slots, lengths, common)
        return LightningMetadata(
            num_decodes=base.num_decodes,
            num_decode_tokens=base.num_decode_tokens,
            num_tokens=base.num_decode_tokens + base.num_prefill_tokens,
            lengths=lengths[base.num_decodes :].tolist(),
            query_start_loc=base.query_start_loc,
            slots=slots,
        )

    def _clear(self, slots: torch.Tensor, lengths: torch.Tensor, common: CommonAttentionMetadata) -> None:
        """Zero the states of requests whose whole sequence is in this step."""
        # The bound is exact for requests without context, and too large at most for others.
        total = common.seq_lens_cpu_upper_bound
        total = common.seq_lens.cpu() if total is None else total
        fresh = ((total[: len(lengths)] == lengths) & (lengths > 0)).nonzero().flatten()
        if not len(fresh):
            return
        if slots.is_cuda:
            fresh = fresh.pin_memory().to(slots.device, non_blocking=True)
        # Slots of padded rows are -1; dummy steps have such among the fresh ones. Block 0 is vLLM's, and never a request's.
        places = slots[fresh].clamp(min=0).long()
        for layer in self._layers:
            layer.kv_cache[0].index_fill_(0, places, 0.0)


class LightningBackend(LinearAttentionBackend):
    """vLLM's way from a layer to its builder."""

    @staticmethod
    def get_name() -> str:
        return "POSTTRAIN_LIGHTNING"

    @staticmethod
    def get_builder_cls() -> type[LightningMetadataBuilder]:
        return LightningMetadataBuilder


class Recurrence(nn.Module, MambaBase):
    """The attention proper, behind the operator at which vLLM cuts the graph; holds no parameters, and the states in fp32."""

    def __init__(self, vllm_config: VllmConfig, rates: list[float], head_dim: int, prefix: str) -> None:
        super().__init__()
        self.rates, self.head_dim, self.prefix = rates, head_dim, prefix
        self._slopes: torch.Tensor | None = None  # neither parameter nor buffer: a reload of weights would lose it
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"two layers are named {prefix}")
        context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((len(self.rates), self.head_dim, self.head_dim),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    def get_attn_backend(self) -> type[LightningBackend]:
        return LightningBackend

    def forward(self, qkv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T, 3 H D], q, k and v of each head side by side, after SiLU -> [T, H D]; padded rows are zero."""
        out = qkv.new_zeros(qkv.shape[0], len(self.rates) * self.head_dim)
        torch.ops.vllm.linear_attention(qkv, out, positions, self.prefix)
        return out

    def _forward(self, hidden_states: torch.Tensor, output: torch.Tensor, positions: torch.Tensor) -> None:
        """What the operator calls; names of arguments are its."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            return
        step: LightningMetadata = metadata[self.prefix]
        shape = (step.num_tokens, len(self.rates), -1)
        q, k, v = hidden_states[: step.num_tokens].view(shape).split(self.head_dim, dim=-1)
        out = output[: step.num_tokens].view(shape)
        if self._slopes is None:
            self._slopes = torch.tensor(self.rates, dtype=torch.float32, device=q.device)
        states: torch.Tensor = self.kv_cache[0]  # type: ignore[index]  # bound by vLLM
        (_on_gpu if q.is_cuda else _on_host)(q, k, v, self._slopes, states, step, out)


def _on_host(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    step: LightningMetadata,
    out: torch.Tensor,
) -> None:
    """By torch. States are strided here, a page holds more than one, so rows are taken by index and put back."""
    slots = step.slots.clamp(min=0).long()
    if step.num_decode_tokens:
        rows = slice(step.num_decode_tokens)
        own = states[slots[rows]]
        out[rows] = lightning_decode_step(q[rows], k[rows], v[rows], slopes, own)
        states[slots[rows]] = own
    if step.lengths:
        rows, places = slice(step.num_decode_tokens, None), slots[step.num_decodes :]
        out[rows], final = chunked_attention(
            *(q[rows], k[rows], v[rows], slopes),
            lengths=step.lengths,
            initial_state=states[places],
            output_final_state=True,
        )
        assert final is not None
        states[places] = final


def _on_gpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    states: torch.Tensor,
    step: LightningMetadata,
    out: torch.Tensor,
) -> None:
    """By our operators, which read nothing from the device and change the pool in place."""
    pool, slots = _dense(states, step.slots)
    if step.num_decode_tokens:
        rows = slice(step.num_decode_tokens)
        out[rows] = lightning_decode(q[rows], k[rows], v[rows], slopes, pool, state_slots=slots[rows])
    if step.lengths:
        rows = slice(step.num_decode_tokens, None)
        out[rows] = lightning_attention(
            *(q[rows], k[rows], v[rows], slopes),
            cu_seqlens=step.query_start_loc[step.num_decodes : step.num_decodes + len(step.lengths) + 1] - step.num_decode_tokens,
            initial_state=pool,
            state_slots=slots[step.num_decodes :],
        )[0]


def _dense(states: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool as a contiguous one, and the slots in it.

    A page is as large as one of attention, so a state may be followed by unused memory. Where that is a whole number of states
    (of the released sizes it is none), the pool is seen as one of more, smaller pages.

    Raises:
        ValueError: it is no whole number.
    """
    if states.is_contiguous():
        return states, slots
    size = states[0].numel()
    pages, rest = divmod(states.stride(0), size)
    if rest or not states[0].is_contiguous():
        raise ValueError(
            f"a page of the cache holds {states.stride(0)} numbers, no multiple of the {size} of a lightning state; "
            "choose another block_size"
        )
    shape = ((len(states) - 1) * pages + 1, *states.shape[1:])
    return states.as_strided(shape, (size, *states.stride()[1:])), torch.where(slots < 0, slots, slots * pages)


class LightningAttention(nn.Module):
    """W_out(sigmoid(W_gate x) * RMSNorm_{all heads}(lightning(SiLU(W_qkv x)))), heads shared out over ranks.

    The same as `posttrain.model.attention.LightningAttention`, with parameters under the same names.
    """

    def __init__(self, config: MiniMaxText01Config, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        heads, width = config.num_attention_heads, config.head_dim
        if heads % ranks:
            raise ValueError(f"{heads} attention heads cannot be shared by {ranks} tensor-parallel ranks")
        own = heads // ranks
        inner, quant = heads * width, vllm_config.quant_config
        # Rows are interleaved per head, so a rank's heads are consecutive rows.
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size, 3 * inner, bias=False, quant_config=quant, prefix=f"{prefix}.qkv_proj"
        )
        self.output_gate = ColumnParallelLinear(
            config.hidden_size, inner, bias=False, quant_config=quant, prefix=f"{prefix}.output_gate"
        )
        self.out_proj = RowParallelLinear(inner, config.hidden_size, bias=False, quant_config=quant, prefix=f"{prefix}.out_proj")
        self.norm = ShardedRMSNorm(own * width, config.lightning_norm_eps)
        rates = lightning_slopes(heads, layer, config.num_hidden_layers)[rank * own : (rank + 1) * own]
        self.attn = Recurrence(vllm_config, rates, width, f"{prefix}.attn")

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        qkv, _ = self.qkv_proj(x)
        gate, _ = self.output_gate(x)
        mixed = torch.sigmoid(gate) * self.norm(self.attn(F.silu(qkv), positions))
        return self.out_proj(mixed)[0]


class ShardedRMSNorm(RMSNorm):
    """RMSNorm over the heads of all ranks: sums of squares are added up across them."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Take this rank's part of [H D]."""
        size = param.shape[0]
        param.data.copy_(loaded_weight.narrow(0, get_tensor_model_parallel_rank() * size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, own H D] -> the same."""
        ranks = get_tensor_model_parallel_world_size()
        if ranks == 1:
            return super().forward(x)
        wide = x.float()
        squares = all_reduce(wide.square().sum(dim=-1, keepdim=True)) / (x.shape[-1] * ranks)
        return (wide * torch.rsqrt(squares + self.eps)).to(x.dtype) * self.weight
