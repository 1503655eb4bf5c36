"""The trunk of MiniMax-Text-01: embedding, blocks of attention and experts, final norm. Every path runs on flat tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from posttrain.data.layout import SequenceLayout
from posttrain.model.attention import LightningAttention, SoftmaxAttention
from posttrain.model.batch import FlatBatch, flatten_batch, refuse_unknown
from posttrain.model.cache import HybridCache
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.experts import Experts, MiniMaxText01SparseMoe
from posttrain.model.head import LMHead
from posttrain.model.layers import RMSNorm, compute_dtype, rotary_tables
from posttrain.model.outputs import HiddenOutput
from posttrain.model.router import check_routes, router_load

CheckpointPolicy = Literal["block", "attention"]


class MiniMaxText01DecoderLayer(GradientCheckpointingLayer):
    """x1 = norm(x); y = alpha_a x1 + beta_a attention(x1); y1 = norm(y); out = alpha_m y1 + beta_m experts(y1).

    The residual carries the normalised value (`postnorm` of the released files); DeepNorm's beta is an initial gain,
    so the released betas are 1. Source: MiniMax-01 paper section 4.1, released modelling code.
    """

    def __init__(self, config: MiniMaxText01Config, layer: int) -> None:
        super().__init__()
        self.is_lightning = config.attn_type_list[layer] == 0
        self.self_attn = LightningAttention(config, layer) if self.is_lightning else SoftmaxAttention(config, layer)
        self.block_sparse_moe = MiniMaxText01SparseMoe(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kind = "linear_attention" if self.is_lightning else "full_attention"
        self.attn_alpha, self.attn_beta = (getattr(config, f"layernorm_{kind}_{factor}") for factor in ("alpha", "beta"))
        self.mlp_alpha, self.mlp_beta = (getattr(config, f"layernorm_mlp_{factor}") for factor in ("alpha", "beta"))

    def forward(
        self,
        x: torch.Tensor,
        layout: SequenceLayout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: HybridCache | None = None,
        routes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, hidden] -> [T, hidden], the experts chosen (or given as `routes`) [T, k], and the router's logits [T, E]."""
        x = self.input_layernorm(x)
        if self.is_lightning:
            attended = self.self_attn(x, layout, cache)
        else:
            attended = self.self_attn(x, layout, rotary, cache)
        x = self.post_attention_layernorm(_residual(x, self.attn_alpha, attended, self.attn_beta))
        mixed, chosen, scores = self.block_sparse_moe(x, routes)
        return _residual(x, self.mlp_alpha, mixed, self.mlp_beta), chosen, scores


def _residual(x: torch.Tensor, alpha: float, branch: torch.Tensor, beta: float) -> torch.Tensor:
    """alpha * x + beta * branch, in one pass over memory where beta is 1, as it is in the released models."""
    return torch.add(branch if beta == 1.0 else beta * branch, x, alpha=alpha)


class MiniMaxText01PreTrainedModel(PreTrainedModel):
    """What the model classes share.

    Attributes:
        checkpoint_policy: what `gradient_checkpointing_enable` recomputes in the backward pass, set before it is called:
            whole blocks ("block", least memory) or attention alone ("attention": what attention keeps is freed, and the
            experts, most of the arithmetic, are not computed again).
    """

    config_class: type[Any] = MiniMaxText01Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    checkpoint_policy: CheckpointPolicy = "block"
    _no_split_modules = ["MiniMaxText01DecoderLayer"]
    _keep_in_fp32_modules_strict = ["block_sparse_moe.gate"]
    _skip_keys_device_placement = ["past_key_values", "layout"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of `initializer_range`."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | LMHead):
            init.normal_(module.weight, 0.0, std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, 0.0, std)
            init.normal_(module.down_proj, 0.0, std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Recompute what `checkpoint_policy` names, in every `every_n_layers`-th layer."""
        if self.checkpoint_policy not in ("block", "attention"):
            raise ValueError(f"checkpoint_policy must be 'block' or 'attention', got {self.checkpoint_policy!r}")
        layers = [module for module in self.modules() if isinstance(module, MiniMaxText01DecoderLayer)]
        for number, layer in enumerate(layers):
            wanted = enable and number % every_n_layers == 0
            for module, policy in ((layer, "block"), (layer.self_attn, "attention")):
                module._gradient_checkpointing_func = gradient_checkpointing_func
                module.gradient_checkpointing = wanted and policy == self.checkpoint_policy


@dataclass
class _Seen:
    """Lists that a pass fills, one entry a layer: inputs [T, hidden], experts [T, k], router logits [T, E]. None is not kept."""

    states: list[torch.Tensor] | None
    routes: list[torch.Tensor] | None
    scores: list[torch.Tensor] | None


class MiniMaxText01Model(MiniMaxText01PreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: MiniMaxText01Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MiniMaxText01DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        layout: SequenceLayout | None = None,
        routes: torch.Tensor | np.ndarray | None = None,
        output_routes: bool = False,
        output_router_load: bool = False,
        **kwargs: Any,
    ) -> HiddenOutput:
        """Hidden states after the final norm.

        Args:
            input_ids: [B, L] padded or [1, T] packed; or `inputs_embeds` [B, L, hidden].
            attention_mask, position_ids, layout: how documents lie in it, see `flatten_batch`.
            past_key_values: cache that document n continues in row n; its states, keys, values and lengths move on.
            use_cache: start a cache where none is given. Only when asked for, whatever the configuration says.
            output_hidden_states, output_router_logits, output_routes, output_router_load: what else to return.
            routes: experts to take instead of the router's choice, int16 [T, layers, k] for the tokens that are no
                padding; see `router.check_routes` and, for what rollout engines return, `router.pack_routes`.

        A pass with a cache is one without gradients.

        Raises:
            ValueError: what `flatten_batch` and `check_routes` refuse; cache rows and documents that differ in number; a row
                that overflows its cache; arguments that this model cannot honour.
        """
        refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, HybridCache):
            raise ValueError(f"past_key_values must be a HybridCache, got {type(past_key_values).__name__}")
        inputs = input_ids if input_ids is not None else inputs_embeds
        assert inputs is not None
        batch = flatten_batch(inputs, attention_mask, position_ids, layout, past_key_values)
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.new_cache(batch.layout)
        if routes is not None:
            routes = check_routes(
                routes,
                tokens=batch.layout.total,
                layers=self.config.num_hidden_layers,
                experts=self.config.num_local_experts,
                top_k=self.config.num_experts_per_tok,
                device=inputs.device,
            )
        seen = _Seen(
            states=[] if output_hidden_states else None,
            routes=[] if output_routes or output_router_load else None,
            scores=[] if output_router_logits or output_router_load else None,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = self._run(batch, cache, routes, seen)
        if cache is not None and layout is None:
            cache.count_padding(batch.shape[1] - batch.layout.max_length)
        experts = torch.stack(seen.routes, dim=1).to(torch.int16) if seen.routes is not None else None
        return HiddenOutput(
            last_hidden_state=batch.restore(x),
            past_key_values=cache,
            hidden_states=tuple(batch.restore(state) for state in (*seen.states, x)) if seen.states is not None else None,
            router_logits=tuple(batch.restore(s).flatten(0, 1) for s in seen.scores or ()) if output_router_logits else None,
            router_load=router_load(seen.scores or [], experts) if output_router_load and experts is not None else None,
            routes=experts if output_routes else None,
        )

    def new_cache(self, layout: SequenceLayout) -> HybridCache:
        """An empty cache, one row a document, that grows."""
        weight = self.embed_tokens.weight
        return HybridCache(
            self.config, layout.num_documents, layout.max_length, device=weight.device, dtype=weight.dtype, grows=True
        )

    def _run(self, batch: FlatBatch, cache: HybridCache | None, routes: torch.Tensor | None, seen: _Seen) -> torch.Tensor:
        """Final hidden states [T, hidden]; what `seen` has lists for is put there."""
        tokens, layout, config = batch.tokens, batch.layout, self.config
        positions = layout.position_ids
        if cache is not None:
            if cache.batch_size != layout.num_documents:
                raise ValueError(f"the cache has {cache.batch_size} rows, the batch {layout.num_documents} documents")
            cache.make_room(layout.lengths)  # before any layer writes: an index past the end kills a CUDA context
            positions = positions + torch.tensor(cache.lengths, device=tokens.device)[layout.document_ids]
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        rotary = rotary_tables(positions, config.rotary_dim, config.rope_theta, compute_dtype(x))
        for number, layer in enumerate(self.layers):
            if seen.states is not None:
                seen.states.append(x)
            x, chosen, scores = layer(x, layout, rotary, cache, None if routes is None else routes[:, number])
            if seen.routes is not None:
                seen.routes.append(chosen)
            if seen.scores is not None:
                seen.scores.append(scores)
        if cache is not None:
            cache.advance(layout.lengths)
        return self.norm(x)
