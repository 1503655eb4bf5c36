"""Which expert takes which token: choosing, replaying given choices, load and balance losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.data.layout import SequenceLayout

FREE = -1
"""In given routes, all entries of a token that chooses for itself (an engine reports no experts for its last token)."""


def choose(logits: torch.Tensor, top_k: int, given: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of every token and their shares.

    The shares are the softmax over all experts, renormalised over the chosen ones, whether the router chose them or
    `given` did; so the gate's gradient is the same function of the choice in both cases.

    Args:
        logits: [T, E], fp32 or fp64.
        top_k: experts a token takes.
        given: choices to replay instead, integer [T, k], checked by `check_routes`; rows of `FREE` choose for themselves.

    Returns:
        Shares [T, k] in the type of `logits`, and experts int64 [T, k].

    Source: MiniMax-01 paper section 2.1, equation 1.
    """
    probabilities = logits.softmax(dim=-1)
    weights, routes = probabilities.topk(top_k, dim=-1)
    if given is not None:
        routes = torch.where(given < 0, routes, given.to(routes.dtype))
        weights = probabilities.gather(1, routes)
    return weights / weights.sum(dim=-1, keepdim=True), routes


def check_routes(
    routes: torch.Tensor | np.ndarray, *, tokens: int, layers: int, experts: int, top_k: int, device: torch.device
) -> torch.Tensor:
    """Given routes on the model's device, int16 [T, layers, k].

    Raises:
        ValueError: another shape or type, an expert that does not exist, one expert twice for a token, or a token that is
            `FREE` only in part.
    """
    given = torch.as_tensor(routes)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"routes must be integers (int16), got {given.dtype}")
    if given.shape != (tokens, layers, top_k):
        wanted = [tokens, layers, top_k]
        raise ValueError(f"routes must be [tokens, layers, experts per token] = {wanted}, got {list(given.shape)}")
    free = (given == FREE).flatten(1)
    if bool((free.any(dim=1) & ~free.all(dim=1)).any()):
        raise ValueError(f"routes of a token must be {FREE} in all layers or in none")
    if given.numel() and (int(given.min()) < FREE or int(given.max()) >= experts):
        raise ValueError(f"routes must be in 0..{experts - 1}, found {int(given.min())}..{int(given.max())}")
    ordered = given.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != FREE)
    if bool(twice.any()):
        token, layer = (int(i) for i in twice.any(dim=-1).nonzero()[0])
        raise ValueError(f"routes name one expert twice: token {token}, layer {layer}: {given[token, layer].tolist()}")
    return given.to(device=device, dtype=torch.int16)


def pack_routes(pieces: Sequence[np.ndarray | torch.Tensor | None], layout: SequenceLayout) -> torch.Tensor:
    """Routes of a packed batch from those of its documents, int16 [T, layers, k] on the host.

    Args:
        pieces: one a document: [length, layers, k], or [length - 1, layers, k] as `RolloutOutput.routed_experts` (the last
            generated token was never fed to the engine's model), or None. What is missing becomes `FREE`.
        layout: the documents.

    Raises:
        ValueError: pieces of another length or number, or nothing but None.
    """
    if len(pieces) != layout.num_documents:
        raise ValueError(f"{len(pieces)} pieces of routes for {layout.num_documents} documents")
    shape = next((tuple(piece.shape[1:]) for piece in pieces if piece is not None), None)
    if shape is None:
        raise ValueError("no document has routes; leave routes out")
    packed = torch.full((layout.total, *shape), FREE, dtype=torch.int16)
    offset = 0
    for number, (piece, length) in enumerate(zip(pieces, layout.lengths, strict=True)):
        if piece is not None:
            if len(piece) not in (length, length - 1):
                raise ValueError(
                    f"document {number} has {length} tokens, so routes of {length} or {length - 1}; got {len(piece)}"
                )
            packed[offset : offset + len(piece)] = torch.as_tensor(piece).to(torch.int16)
        offset += length
    return packed


@dataclass(frozen=True)
class RouterLoad:
    """How evenly tokens spread over experts, one row a layer. No expert drops a token, so there is no count of drops.

    Attributes:
        counts: token-expert pairs, int64 [layers, E]; each row adds up to T * k.
        probability: mean probability over tokens, [layers, E], differentiable; zero without tokens.
        entropy: mean entropy of the router's distribution in nats, [layers], detached.
        tokens: T.
    """

    counts: torch.Tensor
    probability: torch.Tensor
    entropy: torch.Tensor
    tokens: int

    @property
    def fraction(self) -> torch.Tensor:
        """Fraction of the tokens that each expert takes, [layers, E]; each row adds up to k."""
        return self.counts.to(self.probability.dtype) / max(self.tokens, 1)


def router_load(logits: Sequence[torch.Tensor], routes: torch.Tensor) -> RouterLoad:
    """Load of every layer, from logits [T, E] a layer and routes [T, layers, k]."""
    experts, tokens = logits[0].shape[1], logits[0].shape[0]
    counts, probability, entropy = [], [], []
    for layer, scores in enumerate(logits):
        logprobs = scores.log_softmax(dim=-1)
        likelihood = logprobs.exp()
        counts.append(torch.bincount(routes[:, layer].flatten().long(), minlength=experts))
        probability.append(likelihood.sum(dim=0) / max(tokens, 1))
        entropy.append(-(likelihood * logprobs).detach().sum() / max(tokens, 1))
    return RouterLoad(torch.stack(counts), torch.stack(probability), torch.stack(entropy), tokens)


def paper_balance_loss(load: RouterLoad) -> torch.Tensor:
    """1/E sum_i f_i m_i, mean over layers; the paper weighs it with 0.01.

    f_i is the fraction of tokens that take expert i (adds up to k), m_i their mean probability. With an even load it is
    k / E^2: 0.002 for 2 of 32 experts, where `transformers_balance_loss` gives 2. Coefficients of one form do not fit the
    other; they differ by E^2 = 1,024 in scale.

    Source: MiniMax-01 paper section 2.1 (auxiliary loss; GShard's form).
    """
    return (load.fraction * load.probability).sum(dim=1).mean() / load.counts.shape[1]


def transformers_balance_loss(load: RouterLoad) -> torch.Tensor:
    """E sum_i f_i P_i with f and P pooled over all layers; released configurations weigh it with 0.001.

    Pooling lets layers that prefer different experts make up for each other, which the paper's form does not.

    Source: `load_balancing_loss_func` of transformers' Mixtral and MiniMax (Switch Transformer, equations 4 to 6).
    """
    return (load.fraction.mean(dim=0) * load.probability.mean(dim=0)).sum() * load.counts.shape[1]
