"""The rollout port: what an engine takes, what it gives back, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch

LogprobSemantics = Literal["processed", "raw"]
"""`processed`: of the distribution sampled from (after temperature and truncation). `raw`: of the model's logits."""

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled.

    Attributes:
        max_new_tokens: most tokens generated, at least 1.
        temperature: 0 is greedy (log-probabilities are then those at temperature 1).
        top_p: 1 samples the full vocabulary; below 1 only engines whose semantics are declared for it accept.
        stop_token_ids: generation ends with, and includes, the first of these.
        seed: the request's own noise; the same seed, prompt and weights give the same tokens in any batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class RolloutRequest:
    """One prompt to continue, as token ids: an engine never sees text."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class RolloutOutput:
    """What was generated for one request; all per-token fields have the length of `token_ids`.

    Attributes:
        token_ids: generated tokens, the stop token included.
        logprobs: natural logarithm of each token's probability, under the engine's `logprob_semantics`.
        weight_versions: version of the weights that made each token.
        finish_reason: `stop` (a stop token), `length` (max_new_tokens or the model's longest position), `cancelled`.
        routed_experts: int16 [prompt + generated - 1, layers, experts per token] when asked for: the experts of every
            token that was fed to the model (the last generated token was not), else None.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_versions: tuple[int, ...]
    finish_reason: FinishReason
    routed_experts: np.ndarray | None = field(default=None, compare=False)


@runtime_checkable
class WeightSource(Protocol):
    """Where an engine gets weights from: tensors under checkpoint names, grouped by layer."""

    @property
    def version(self) -> int:
        """Of the weights."""
        ...

    def groups(self) -> Iterable[list[tuple[str, torch.Tensor]]]:
        """Yield one list of (name, tensor) a layer; embeddings and head are groups of their own.

        A reader that keeps tensors past its request for the next group copies them: their memory may be used again.
        """
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Continues token sequences with one model, at one weight version at a time."""

    logprob_semantics: LogprobSemantics
    weight_version: int

    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutOutput]:
        """Continue every request; outputs come in the order of the requests. ValueError for a request that cannot run."""
        ...

    def update_weights(self, source: WeightSource) -> None:
        """Take over new weights and their version; a missing, extra or misshapen tensor is a ValueError and changes nothing."""
        ...

    def cancel(self, request_ids: Iterable[str]) -> None:
        """End running requests; they come back with what they have and finish reason `cancelled`."""
        ...

    def close(self) -> None:
        """Free what the engine holds; a second call does nothing."""
        ...
