"""MiniMax-Text-01 in vLLM, which has no model of it any more since 0.24."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from posttrain.config.errors import UserError
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.layers import RMSNorm
from posttrain.rollout.vllm.experts import SparseMoe
from posttrain.rollout.vllm.lightning import LightningAttention
from posttrain.rollout.vllm.loading import copy, load_weights
from posttrain.rollout.vllm.softmax import SoftmaxAttention, rotary_tables


def config_of(vllm_config: VllmConfig) -> MiniMaxText01Config:
    """Our configuration of the model that vLLM was given, whichever of the three kinds its config.json is.

    Raises:
        ValueError: it asks for what is not implemented.
    """
    config = vllm_config.model_config.hf_config
    return config if isinstance(config, MiniMaxText01Config) else MiniMaxText01Config.from_dict(config.to_dict())


class DecoderLayer(nn.Module):
    """x1 = norm(x); y = alpha_a x1 + beta_a attention(x1); y1 = norm(y); out = alpha_m y1 + beta_m experts(y1).

    The residual carries the normalised value, as in `posttrain.model.backbone.MiniMaxText01DecoderLayer`.
    """

    def __init__(self, config: MiniMaxText01Config, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        self.is_lightning = config.attn_type_list[layer] == 0
        if self.is_lightning:
            self.self_attn: nn.Module = LightningAttention(config, vllm_config, layer, f"{prefix}.self_attn")
        else:
            self.self_attn = SoftmaxAttention(config, vllm_config, f"{prefix}.self_attn")
        self.block_sparse_moe = SparseMoe(config, vllm_config, layer, f"{prefix}.block_sparse_moe")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kind = "linear_attention" if self.is_lightning else "full_attention"
        self.attn_alpha, self.attn_beta = (getattr(config, f"layernorm_{kind}_{factor}") for factor in ("alpha", "beta"))
        self.mlp_alpha, self.mlp_beta = (getattr(config, f"layernorm_mlp_{factor}") for factor in ("alpha", "beta"))

    def forward(self, x: torch.Tensor, positions: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        x = self.input_layernorm(x)
        attended = self.self_attn(x, positions if self.is_lightning else rotary)
        x = self.post_attention_layernorm(self.attn_alpha * x + self.attn_beta * attended)
        return self.mlp_alpha * x + self.mlp_beta * self.block_sparse_moe(x)


# Dimensions are said here, because vLLM does not see through annotations that are strings. On a CPU the experts group tokens on
# the host, which no graph holds.
@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0},
    enable_if=lambda _: not current_platform.is_cpu(),
)
class MiniMaxText01Model(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = config_of(vllm_config)
        self.rotary_dim, self.rope_theta = config.rotary_dim, config.rope_theta
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, vllm_config, layer, f"{prefix}.layers.{layer}") for layer in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ids [T] or embeddings [T, hidden], and positions [T] -> [T, hidden]."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = rotary_tables(positions, self.rotary_dim, self.rope_theta)
        for layer in self.layers:
            x = layer(x, positions, rotary)
        return self.norm(x)


class MiniMaxText01ForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """The language model as vLLM runs it: states, router and head in fp32, whatever the weights are in.

    Tensor parallelism shares out heads, the inner width of experts and the vocabulary. Pipeline parallelism and adapters are
    not implemented, and vLLM refuses them.

    Raises:
        UserError: with speculative decoding.
        ValueError: sizes that cannot be shared by the tensor-parallel ranks, or a model that is not implemented.
    """

    # What is quantised or not is named by the checkpoint's parts. Only softmax layers' q, k and v are one parameter.
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.speculative_config is not None:
            raise UserError("speculative decoding takes tokens back, and a lightning state cannot", instead="leave it out")
        self.config = config_of(vllm_config)
        self.model = MiniMaxText01Model(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size, params_dtype=torch.float32)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        for parameter in self.parameters():
            if getattr(parameter, "weight_loader", None) is None:
                parameter.weight_loader = copy  # type: ignore[attr-defined]

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final hidden states [T, hidden]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[T, hidden] -> fp32 [T, V]."""
        return self.logits_processor(self.lm_head, hidden_states.float())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """See `loading.load_weights`."""
        return load_weights(self, weights)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Of one rank's states of a lightning layer."""
        config = config_of(vllm_config)
        heads = config.num_attention_heads // vllm_config.parallel_config.tensor_parallel_size
        return ((heads, config.head_dim, config.head_dim),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """fp32: states in bf16 drift away from the trainer's."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """How prefix caching copies a state."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()
