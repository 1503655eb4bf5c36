"""What the model classes return: transformers' outputs, indexed as they are there, with fields of ours behind theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from posttrain.model.router import RouterLoad


@dataclass
class HiddenOutput(BaseModelOutputWithPast):
    """Output of `MiniMaxText01Model`; what was not asked for is None.

    Attributes:
        last_hidden_state: [B, L, hidden], zero where the input was padding.
        past_key_values: the `HybridCache` that the call continued or made.
        hidden_states: embeddings, then every layer's output but the last, then `last_hidden_state`, [B, L, hidden] each.
        router_logits: one [B * L, E] a layer, fp32, zero where the input was padding.
        router_load: see `router.RouterLoad`; padding is not counted.
        routes: chosen experts of the tokens that are no padding, int16 [T, layers, k].
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    router_load: RouterLoad | None = None
    routes: torch.Tensor | None = None


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """Output of `MiniMaxText01ForCausalLM`; what was not asked for is None. Attentions are never given.

    Attributes:
        loss: mean negative log-likelihood of `labels`, fp32 scalar, plus the weighted `aux_loss` where there is one.
        logits: fp32 [B, columns kept, V], zero where the input was padding.
        past_key_values, hidden_states, router_logits, router_load, routes: see `HiddenOutput`.
        aux_loss: `router.transformers_balance_loss`, not weighted.
        token_logprobs, token_entropy: fp32 [T], see `MiniMaxText01ForCausalLM.forward`.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_load: RouterLoad | None = None
    token_logprobs: torch.Tensor | None = None
    token_entropy: torch.Tensor | None = None
    routes: torch.Tensor | None = None


@dataclass
class SequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """Output of `MiniMaxText01ForSequenceClassification`: `logits` fp32 [documents, num_labels]."""
