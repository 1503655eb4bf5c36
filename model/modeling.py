"""MiniMax-Text-01: lightning and softmax attention, experts, DeepNorm residuals. Every path runs on flat tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from posttrain.data.layout import SequenceLayout
from posttrain.model.attention import LightningAttention, SoftmaxAttention
from posttrain.model.batch import flatten_batch
from posttrain.model.cache import HybridCache
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.experts import Experts, MiniMaxText01SparseMoe
from posttrain.model.head import LMHead
from posttrain.model.layers import RMSNorm, compute_dtype, rotary_tables


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
        self.attn_alpha: float = getattr(config, f"layernorm_{kind}_alpha")
        self.attn_beta: float = getattr(config, f"layernorm_{kind}_beta")
        self.mlp_alpha, self.mlp_beta = config.layernorm_mlp_alpha, config.layernorm_mlp_beta

    def forward(
        self, x: torch.Tensor, layout: SequenceLayout, rotary: tuple[torch.Tensor, torch.Tensor], cache: HybridCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden] -> [T, hidden] and the experts chosen, [T, k]."""
        x = self.input_layernorm(x)
        if self.is_lightning:
            attended = self.self_attn(x, layout, cache)
        else:
            attended = self.self_attn(x, layout, rotary, cache)
        x = self.post_attention_layernorm(self.attn_alpha * x + self.attn_beta * attended)
        mixed, routes = self.block_sparse_moe(x)
        return self.mlp_alpha * x + self.mlp_beta * mixed, routes


class MiniMaxText01PreTrainedModel(PreTrainedModel):
    """What the model classes share."""

    config_class = MiniMaxText01Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniMaxText01DecoderLayer"]
    _keep_in_fp32_modules_strict = ["block_sparse_moe.gate"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of `initializer_range`."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | LMHead):
            module.weight.normal_(0.0, std)
        elif isinstance(module, Experts):
            module.gate_up_proj.normal_(0.0, std)
            module.down_proj.normal_(0.0, std)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)


class MiniMaxText01Model(MiniMaxText01PreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: MiniMaxText01Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MiniMaxText01DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, tokens: torch.Tensor, layout: SequenceLayout, cache: HybridCache | None = None, output_routes: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Final hidden states of flat tokens.

        Args:
            tokens: [T] ids, documents one behind the other.
            layout: their documents.
            cache: document n continues row n; its states, keys, values and lengths move on.
            output_routes: also return the chosen experts.

        Returns:
            Hidden states [T, hidden], and experts int16 [T, layers, k] or None.

        Raises:
            ValueError: cache rows and documents differ in number, or a row overflows.
        """
        positions = layout.position_ids
        if cache is not None:
            if cache.batch_size != layout.num_documents:
                raise ValueError(f"the cache has {cache.batch_size} rows, the batch {layout.num_documents} documents")
            cache.check_room(layout.lengths)  # before any layer writes: an index past the end kills a CUDA context
            positions = positions + torch.tensor(cache.lengths, device=tokens.device)[layout.document_ids]
        x = self.embed_tokens(tokens)
        rotary = rotary_tables(positions, self.config.rotary_dim, self.config.rope_theta, compute_dtype(x))
        routes = []
        for layer in self.layers:
            x, chosen = layer(x, layout, rotary, cache)
            routes.append(chosen)
        if cache is not None:
            cache.advance(layout.lengths)
        return self.norm(x), torch.stack(routes, dim=1).to(torch.int16) if output_routes else None


@dataclass
class CausalLMOutput(ModelOutput):
    """Output of `MiniMaxText01ForCausalLM`; what was not asked for is None.

    Attributes:
        loss: mean negative log-likelihood of `labels`, fp32 scalar.
        logits: fp32 [B, L, V], zero where the input was padding.
        token_logprobs: fp32 [T], see `MiniMaxText01ForCausalLM.token_logprobs`.
        routes: int16 [T, layers, k].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_logprobs: torch.Tensor | None = None
    routes: torch.Tensor | None = None


class MiniMaxText01ForCausalLM(MiniMaxText01PreTrainedModel):
    """The language model, with an fp32 head."""

    def __init__(self, config: MiniMaxText01Config) -> None:
        super().__init__(config)
        self.model = MiniMaxText01Model(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> LMHead:
        """The head."""
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        layout: SequenceLayout | None = None,
        return_token_logprobs: bool = False,
        temperature: float = 1.0,
        output_routes: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits, or a loss, or per-token log-probabilities.

        Args:
            input_ids: [B, L] padded or [1, T] packed.
            attention_mask, position_ids, layout: how documents lie in it, see `flatten_batch`.
            labels: like input_ids; a token counts with its own label, -100 where it does not. Gives `loss`.
            return_token_logprobs: give `token_logprobs` instead of logits; no tensor of tokens x vocabulary is held.
            temperature: logits are divided by it before `token_logprobs`.
            output_routes: also return the chosen experts.
            num_items_in_batch: the loss is divided by it instead of by the number of its own labels.
        """
        batch = flatten_batch(input_ids, attention_mask, position_ids, layout)
        hidden, routes = self.model(batch.tokens, batch.layout, output_routes=output_routes)
        if return_token_logprobs or labels is not None:
            logprobs = self._shifted_logprobs(hidden, batch.tokens, batch.layout, temperature)
            if labels is None:
                return CausalLMOutput(token_logprobs=logprobs, routes=routes)
            flat = labels.flatten() if batch.places is None else labels.flatten()[batch.places]
            counted = (flat != -100) & (batch.layout.position_ids > 0)
            divisor = num_items_in_batch if num_items_in_batch is not None else counted.sum().clamp(min=1)
            loss = -(logprobs * counted).sum() / divisor
            if return_token_logprobs:
                return CausalLMOutput(loss=loss, token_logprobs=logprobs, routes=routes)
            return CausalLMOutput(loss=loss, logits=batch.restore(self.lm_head(hidden)), routes=routes)
        return CausalLMOutput(logits=batch.restore(self.lm_head(hidden)), routes=routes)

    def token_logprobs(self, input_ids: torch.Tensor, layout: SequenceLayout, temperature: float = 1.0) -> torch.Tensor:
        """Log-probability of every token of [1, T] given those before it in its document, fp32 [T]; 0 for first tokens."""
        output = self(input_ids, layout=layout, return_token_logprobs=True, temperature=temperature)
        return output.token_logprobs

    def next_token_logits(
        self, tokens: torch.Tensor, layout: SequenceLayout, cache: HybridCache, output_routes: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take tokens into the cache; logits after each document's last token, fp32 [N, V], and routes. No empty documents."""
        hidden, routes = self.model(tokens, layout, cache, output_routes)
        return self.lm_head(hidden[layout.cu_seqlens[1:].long() - 1]), routes

    def _shifted_logprobs(
        self, hidden: torch.Tensor, tokens: torch.Tensor, layout: SequenceLayout, temperature: float
    ) -> torch.Tensor:
        targets = torch.cat([tokens[1:], tokens[:1]])
        ahead = self.lm_head(hidden, targets, temperature)
        shifted = torch.cat([ahead[-1:], ahead[:-1]])
        return torch.where(layout.position_ids > 0, shifted, 0.0)


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """Output of `MiniMaxText01ForSequenceClassification`: `logits` fp32 [documents, num_labels]."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class MiniMaxText01ForSequenceClassification(MiniMaxText01PreTrainedModel):
    """A score for every document, read at its last real token whatever the padding."""

    def __init__(self, config: MiniMaxText01Config) -> None:
        super().__init__(config)
        self.model = MiniMaxText01Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        layout: SequenceLayout | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Scores fp32 [documents, num_labels]; an empty document is a ValueError."""
        batch = flatten_batch(input_ids, attention_mask, position_ids, layout)
        if not all(batch.layout.lengths):
            raise ValueError("a document without tokens has no score")
        hidden, _routes = self.model(batch.tokens, batch.layout)
        last = hidden[batch.layout.cu_seqlens[1:].long() - 1]
        compute = compute_dtype(last)
        return SequenceClassifierOutput(logits=last.to(compute) @ self.score.weight.to(compute).T)
