"""An engine for tests: it implements the whole port on a table of numbers instead of a model.

Code that drives an engine can be tested with it in microseconds, and the contract that holds for it and for the real
engines alike shows that such tests mean something. It shares only the noise with them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from posttrain.rollout.noise import uniform
from posttrain.rollout.types import FinishReason, LogprobSemantics, RolloutOutput, RolloutRequest, WeightSource

WEIGHT = "table"
"""Name of the one tensor, fp32 [V, V]: row i holds the logits after token i."""


class FakeEngine:
    """A Markov chain over tokens: what follows depends on the last token alone, through `table`.

    Attributes:
        table: fp64 [V, V] logits, see `WEIGHT`.
        weight_version: of the table.
        step_seconds: how long a token takes, so that there is time to cancel.
        closed: whether `close` was called.
    """

    logprob_semantics: LogprobSemantics = "processed"

    def __init__(
        self,
        vocab_size: int = 16,
        *,
        version: int = 0,
        max_length: int = 4096,
        step_seconds: float = 0.0,
        return_routes: bool = False,
    ) -> None:
        """An engine whose table follows from the size of its vocabulary alone.

        Args:
            vocab_size: V.
            version: of the weights as they are.
            max_length: most tokens of prompt and answer together.
            step_seconds: see the class.
            return_routes: give `routed_experts`: one layer, one expert of two, the token's parity.
        """
        noise = [uniform(torch.arange(vocab_size), column) for column in range(vocab_size)]
        self.table: np.ndarray = torch.stack(noise, dim=1).mul(6).sub(3).numpy()
        self.weight_version = version
        self.max_length = max_length
        self.step_seconds = step_seconds
        self.return_routes = return_routes
        self.closed = False
        self._cancelled: set[str] = set()

    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutOutput]:
        """Continue every request, see `RolloutEngine.generate`."""
        self._cancelled.clear()  # what came after the last request had ended
        limits = [self._limit(request) for request in requests]
        return [self._run(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def update_weights(self, source: WeightSource) -> None:
        """Take over a table of the same shape, see `RolloutEngine.update_weights`."""
        tensors = {name: tensor for group in source.groups() for name, tensor in group}
        if tensors.keys() != {WEIGHT} or tuple(tensors[WEIGHT].shape) != self.table.shape:
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"weights do not fit: expected {WEIGHT} {list(self.table.shape)}, got {shapes}")
        self.table = tensors[WEIGHT].double().numpy().copy()
        self.weight_version = source.version

    def cancel(self, request_ids: Iterable[str]) -> None:
        """End requests of the running `generate` (call from another thread)."""
        self._cancelled.update(request_ids)

    def close(self) -> None:
        """Remember that it was called."""
        self.closed = True

    def _limit(self, request: RolloutRequest) -> int:
        """Most tokens the request may generate. ValueError where it cannot run."""
        room = self.max_length - len(request.prompt_ids)
        if not request.prompt_ids or room < 1:
            raise ValueError(f"request {request.request_id}: a prompt needs 1 to {self.max_length - 1} tokens")
        if request.params.top_p != 1.0:
            raise ValueError(f"request {request.request_id}: top_p below 1 is not sampled here")
        if request.params.max_new_tokens < 1:
            raise ValueError(f"request {request.request_id}: max_new_tokens must be at least 1")
        return min(request.params.max_new_tokens, room)

    def _run(self, request: RolloutRequest, limit: int) -> RolloutOutput:
        tokens: list[int] = []
        logprobs: list[float] = []
        reason: FinishReason | None = None
        while reason is None:
            token, logprob = self._draw(request, tokens)
            tokens.append(token)
            logprobs.append(logprob)
            if self.step_seconds:
                time.sleep(self.step_seconds)
            if token in request.params.stop_token_ids:
                reason = "stop"
            elif len(tokens) >= limit:
                reason = "length"
            elif request.request_id in self._cancelled:
                reason = "cancelled"
        fed = np.array([*request.prompt_ids, *tokens[:-1]], dtype=np.int16)
        return RolloutOutput(
            request_id=request.request_id,
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            weight_versions=(self.weight_version,) * len(tokens),
            finish_reason=reason,
            routed_experts=(fed % 2)[:, None, None] if self.return_routes else None,
        )

    def _draw(self, request: RolloutRequest, tokens: list[int]) -> tuple[int, float]:
        """Next token and its log-probability; temperature 0 is greedy, scored at 1."""
        params = request.params
        logits = self.table[tokens[-1] if tokens else request.prompt_ids[-1]] / (params.temperature or 1.0)
        powers = np.exp(logits - logits.max())
        shares = powers / powers.sum()
        if params.temperature == 0:
            token = int(logits.argmax())
        else:
            drawn = float(uniform(torch.tensor([params.seed]), len(tokens)))
            token = min(int(np.searchsorted(shares.cumsum(), drawn, side="right")), len(shares) - 1)
        return token, float(np.log(shares[token]))
