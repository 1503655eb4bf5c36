"""MiniMax-Text-01 with its heads: the language model and the score of a reward model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import GenerationMixin
from transformers.utils import can_return_tuple

from posttrain.data.layout import SequenceLayout
from posttrain.model.backbone import MiniMaxText01Model, MiniMaxText01PreTrainedModel
from posttrain.model.batch import FlatBatch, flatten_batch
from posttrain.model.cache import HybridCache
from posttrain.model.configuration import MiniMaxText01Config
from posttrain.model.generation import HybridGeneration
from posttrain.model.head import LMHead
from posttrain.model.layers import Float32Linear
from posttrain.model.outputs import CausalLMOutput, HiddenOutput, SequenceClassifierOutput
from posttrain.model.router import transformers_balance_loss

IGNORE = -100
"""Label of a token that is no target."""


class MiniMaxText01ForCausalLM(HybridGeneration, MiniMaxText01PreTrainedModel, GenerationMixin):
    """The language model, with an fp32 head."""

    def __init__(self, config: MiniMaxText01Config) -> None:
        super().__init__(config)
        self.model = MiniMaxText01Model(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> LMHead:
        """The head."""
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        layout: SequenceLayout | None = None,
        return_token_logprobs: bool = False,
        return_token_entropy: bool = False,
        temperature: float = 1.0,
        routes: torch.Tensor | np.ndarray | None = None,
        output_routes: bool = False,
        output_router_load: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits, or a loss, or per-token log-probabilities.

        Args:
            input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, layout, routes,
                output_hidden_states, output_routes, output_router_load: see `MiniMaxText01Model.forward`.
            labels: like input_ids; the target of a token's predecessor, -100 where there is none. Gives `loss`. In training
                mode logits are then left out: the loss is computed in chunks.
            output_router_logits: also give `router_logits` and `aux_loss`, and add `router_aux_loss_coef` times it to the
                loss; by default what the configuration says, and without fields of these names there False and 0.
            logits_to_keep: logits of so many last columns (0: all), or of these columns.
            return_token_logprobs: give `token_logprobs` instead of logits; no tensor of tokens x vocabulary is held.
            return_token_entropy: with it, `token_entropy` of the distribution that each token was drawn from.
            temperature: logits are divided by it before `token_logprobs`.
            num_items_in_batch: the loss is divided by it instead of by the number of its own labels.

        Raises:
            ValueError: see `MiniMaxText01Model.forward`; labels of another shape, or together with a cache.
        """
        if labels is not None and (use_cache or past_key_values is not None):
            raise ValueError("labels with a cache give no gradients; call without use_cache and past_key_values")
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise ValueError("give either input_ids or inputs_embeds")
        if output_router_logits is None:
            output_router_logits = bool(getattr(self.config, "output_router_logits", False))
        batch = flatten_batch(inputs, attention_mask, position_ids, layout, past_key_values)
        embedded = batch.tokens.is_floating_point()
        base: HiddenOutput = self.model(
            input_ids=None if embedded else batch.tokens[None],
            inputs_embeds=batch.tokens[None] if embedded else None,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            layout=batch.layout,
            routes=routes,
            output_routes=output_routes,
            output_router_load=output_router_load or output_router_logits,
            **kwargs,
        )
        cache, hidden, load = base.past_key_values, base.last_hidden_state[0], base.router_load
        if cache is not None and layout is None:
            cache.count_padding(batch.shape[1] - batch.layout.max_length)
        loss = logits = logprobs = entropy = None
        if return_token_logprobs or return_token_entropy:
            logprobs, entropy = self._score_tokens(hidden, batch, temperature, return_token_entropy)
        elif labels is None or not self.training:
            logits = self._logits(hidden, batch, logits_to_keep)
        aux_loss = transformers_balance_loss(load) if output_router_logits and load is not None else None
        if labels is not None:
            loss = self._loss(hidden, batch, labels, num_items_in_batch)
            if aux_loss is not None:
                loss = loss + getattr(self.config, "router_aux_loss_coef", 0.0) * aux_loss
        return CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=tuple(batch.restore(state[0]) for state in base.hidden_states) if base.hidden_states else None,
            aux_loss=aux_loss,
            router_logits=tuple(batch.restore(s).flatten(0, 1) for s in base.router_logits) if base.router_logits else None,
            router_load=load if output_router_load else None,
            token_logprobs=logprobs,
            token_entropy=entropy,
            routes=base.routes,
        )

    def token_logprobs(self, input_ids: torch.Tensor, layout: SequenceLayout, temperature: float = 1.0) -> torch.Tensor:
        """Log-probability of every token of [1, T] given those before it in its document, fp32 [T]; 0 for first tokens."""
        output = self(input_ids, layout=layout, return_token_logprobs=True, temperature=temperature)
        return output.token_logprobs

    def next_token_logits(
        self, tokens: torch.Tensor, layout: SequenceLayout, cache: HybridCache, output_routes: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take tokens [T] into the cache; logits after each document's last token, fp32 [N, V], and routes.

        Raises:
            ValueError: an empty document, which has no last token, or a cache that does not fit.
        """
        if not all(layout.lengths):
            raise ValueError(f"document {layout.lengths.index(0)} is empty, so no token follows it; leave it and its row out")
        base = self.model(tokens[None], layout=layout, past_key_values=cache, output_routes=output_routes)
        return self.lm_head(base.last_hidden_state[0, layout.cu_seqlens[1:].long() - 1]), base.routes

    def _logits(self, hidden: torch.Tensor, batch: FlatBatch, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Logits [B, columns kept, V]."""
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            return batch.restore(self.lm_head(hidden))
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.lm_head(batch.restore(hidden)[:, columns])  # padding is zero, and so are its logits

    def _loss(
        self, hidden: torch.Tensor, batch: FlatBatch, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Negative log-likelihood of labels given the tokens before them; a document's first token has none before it."""
        if labels.shape != batch.shape:
            raise ValueError(f"labels must be {batch.shape} like input_ids, got {tuple(labels.shape)}")
        flat = batch.flat(labels)
        counted = ((flat != IGNORE) & (batch.layout.position_ids > 0)).nonzero().squeeze(1)
        total = self.lm_head(hidden[counted - 1], flat[counted]).sum()
        return -total / (num_items_in_batch if num_items_in_batch is not None else max(len(counted), 1))

    def _score_tokens(
        self, hidden: torch.Tensor, batch: FlatBatch, temperature: float, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probability of every token, and entropy of what it was drawn from where asked for, [T] each."""
        tokens, inside = batch.tokens, batch.layout.position_ids > 0
        if tokens.is_floating_point():
            raise ValueError("token log-probabilities need input_ids, not inputs_embeds")
        targets = torch.cat([tokens[1:], tokens[:1]])

        def shifted(ahead: torch.Tensor) -> torch.Tensor:
            return torch.where(inside, torch.cat([ahead[-1:], ahead[:-1]]), 0.0)

        if not with_entropy:
            return shifted(self.lm_head(hidden, targets, temperature)), None
        logprobs, entropy = self.lm_head(hidden, targets, temperature, with_entropy=True)
        return shifted(logprobs), shifted(entropy)


class MiniMaxText01ForSequenceClassification(MiniMaxText01PreTrainedModel):
    """A score for every document, read at its last real token whatever the padding.

    What is real says the mask or the layout, never `pad_token_id`: a text may hold that token.
    """

    def __init__(self, config: MiniMaxText01Config) -> None:
        super().__init__(config)
        self.model = MiniMaxText01Model(config)
        self.score = Float32Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        layout: SequenceLayout | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Scores fp32 [documents, num_labels].

        Args:
            input_ids, inputs_embeds, attention_mask, position_ids, layout: see `MiniMaxText01Model.forward`.

        Raises:
            ValueError: an empty document, a cache, labels, or what `flatten_batch` refuses.
        """
        for name in ("past_key_values", "labels"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported by the score; leave it out")
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise ValueError("give either input_ids or inputs_embeds")
        batch = flatten_batch(inputs, attention_mask, position_ids, layout)
        if not all(batch.layout.lengths):
            raise ValueError("a document without tokens has no score")
        embedded = batch.tokens.is_floating_point()
        base: HiddenOutput = self.model(
            input_ids=None if embedded else batch.tokens[None],
            inputs_embeds=batch.tokens[None] if embedded else None,
            layout=batch.layout,
            **{**kwargs, "use_cache": False},
        )
        return SequenceClassifierOutput(logits=self.score(base.last_hidden_state[0, batch.layout.cu_seqlens[1:].long() - 1]))
