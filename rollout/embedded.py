"""The engine that runs on the trainer's own model object: no copy of the weights, no other process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from posttrain.data.layout import SequenceLayout
from posttrain.model.cache import HybridCache
from posttrain.model.modeling import MiniMaxText01ForCausalLM
from posttrain.rollout.drawing import sample
from posttrain.rollout.types import FinishReason, LogprobSemantics, RolloutOutput, RolloutRequest, WeightSource


@dataclass
class _Running:
    """A request in flight."""

    index: int
    request: RolloutRequest
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class EmbeddedEngine:
    """Batched sampling with recurrent-state and KV caches.

    Requests run in waves of similar length. Equal prompts of a wave are prefilled once. A row that ends leaves the
    batch. Tokens of a request depend on its seed, its prompt and the weights, not on its neighbours (up to rounding of
    the model's arithmetic, which may differ with the batch's shape).

    Log-probabilities are of the distribution sampled from, over the full vocabulary, in fp32.
    """

    logprob_semantics: LogprobSemantics = "processed"

    def __init__(
        self,
        model: MiniMaxText01ForCausalLM,
        *,
        version: int = 0,
        max_batch_size: int = 512,
        max_batch_tokens: int = 131_072,
        return_routes: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            model: shared, not copied; who steps its optimizer sets `weight_version`.
            version: of the weights as they are.
            max_batch_size: most sequences in a wave.
            max_batch_tokens: most tokens, prompts and answers, that a wave's caches hold.
            return_routes: record the experts of every token (costs a copy to the host a step).
        """
        self.model = model
        self.weight_version = version
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.return_routes = return_routes
        self._cancelled: set[str] = set()

    @torch.no_grad()
    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutOutput]:
        """Continue every request, see `RolloutEngine.generate`."""
        self._cancelled.clear()  # what came after the last request had ended
        running = [_Running(i, request, self._limit(request)) for i, request in enumerate(requests)]
        outputs: dict[int, RolloutOutput] = {}
        for wave in self._waves(running):
            self._run_wave(wave)
            outputs.update((row.index, self._output(row)) for row in wave)
        return [outputs[i] for i in range(len(requests))]

    def update_weights(self, source: WeightSource) -> None:
        """Copy weights into the model, see `RolloutEngine.update_weights`."""
        incoming = {name: tensor for group in source.groups() for name, tensor in group}
        own = self.model.state_dict()
        missing, extra = own.keys() - incoming.keys(), incoming.keys() - own.keys()
        wrong = {name for name in own.keys() & incoming.keys() if own[name].shape != incoming[name].shape}
        if missing or extra or wrong:
            raise ValueError(
                f"weights do not fit: missing {sorted(missing)[:3]}, extra {sorted(extra)[:3]}, misshapen {sorted(wrong)[:3]}"
            )
        self.model.load_state_dict(incoming)
        self.weight_version = source.version

    def cancel(self, request_ids: Iterable[str]) -> None:
        """End requests of the running `generate` (call from another thread)."""
        self._cancelled.update(request_ids)

    def close(self) -> None:
        """Nothing is held beyond the model, which belongs to the caller."""

    def _limit(self, request: RolloutRequest) -> int:
        """Most tokens the request may generate. ValueError where it cannot run."""
        room = self.model.config.max_position_embeddings - len(request.prompt_ids)
        if not request.prompt_ids or room < 1:
            raise ValueError(
                f"request {request.request_id}: a prompt needs 1 to {self.model.config.max_position_embeddings - 1} tokens"
            )
        if request.params.top_p != 1.0:
            raise ValueError(
                f"request {request.request_id}: top_p below 1 would bias importance ratios; the full vocabulary is sampled"
            )
        if request.params.max_new_tokens < 1:
            raise ValueError(f"request {request.request_id}: max_new_tokens must be at least 1")
        return min(request.params.max_new_tokens, room)

    def _waves(self, running: list[_Running]) -> Iterable[list[_Running]]:
        """Groups that fit the caches, longest prompts first, equal prompts side by side."""
        ordered = sorted(running, key=lambda row: (-len(row.request.prompt_ids), row.request.prompt_ids, row.index))
        wave: list[_Running] = []
        capacity = 0
        for row in ordered:
            need = max(capacity, len(row.request.prompt_ids) + row.limit)
            if wave and (len(wave) == self.max_batch_size or need * (len(wave) + 1) > self.max_batch_tokens):
                yield wave
                wave, need = [], len(row.request.prompt_ids) + row.limit
            wave.append(row)
            capacity = need
        if wave:
            yield wave

    def _run_wave(self, wave: list[_Running]) -> None:
        capacity = max(len(row.request.prompt_ids) + row.limit for row in wave)
        cache, logits = self._prefill(wave, capacity)
        device = logits.device
        active = list(wave)
        seeds = torch.tensor([row.request.params.seed for row in active], dtype=torch.int64, device=device)
        temperature = torch.tensor([row.request.params.temperature for row in active], device=device)
        for position in range(capacity):
            tokens, logprobs = sample(logits, seeds, temperature, position)
            self._record(active, tokens.tolist(), logprobs.tolist())
            keep = [i for i, row in enumerate(active) if row.finish_reason is None]
            if not keep:
                return
            if len(keep) < len(active):
                active = [active[i] for i in keep]
                cache.select(keep)
                index = torch.tensor(keep, device=device)
                tokens, seeds, temperature = tokens[index], seeds[index], temperature[index]
            logits, routes = self.model.next_token_logits(tokens, cache.step_layout(device), cache, self.return_routes)
            if routes is not None:
                for row, route in zip(active, routes.cpu().numpy(), strict=True):
                    row.routes.append(route[None])

    def _prefill(self, wave: list[_Running], capacity: int) -> tuple[HybridCache, torch.Tensor]:
        """Take every distinct prompt in once, then copy its row for every request that shares it."""
        distinct: dict[tuple[int, ...], int] = {}
        for row in wave:
            distinct.setdefault(row.request.prompt_ids, len(distinct))
        parameter = next(self.model.parameters())
        cache = HybridCache(self.model.config, len(distinct), capacity, device=parameter.device, dtype=parameter.dtype)
        tokens = torch.tensor([token for prompt in distinct for token in prompt], device=parameter.device)
        layout = SequenceLayout.from_lengths([len(prompt) for prompt in distinct], parameter.device)
        logits, routes = self.model.next_token_logits(tokens, layout, cache, self.return_routes)
        rows = [distinct[row.request.prompt_ids] for row in wave]
        if routes is not None:
            pieces = routes.cpu().split(list(layout.lengths))
            for row, source in zip(wave, rows, strict=True):
                row.routes.append(pieces[source].numpy())
        if rows != list(range(len(distinct))):
            cache.select(rows)
            logits = logits[torch.tensor(rows, device=logits.device)]
        return cache, logits

    def _record(self, active: list[_Running], tokens: list[int], logprobs: list[float]) -> None:
        for row, token, logprob in zip(active, tokens, logprobs, strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if token in row.request.params.stop_token_ids:
                row.finish_reason = "stop"
            elif len(row.tokens) >= row.limit:
                row.finish_reason = "length"
            elif row.request.request_id in self._cancelled:
                row.finish_reason = "cancelled"

    def _output(self, row: _Running) -> RolloutOutput:
        assert row.finish_reason is not None
        return RolloutOutput(
            request_id=row.request.request_id,
            token_ids=tuple(row.tokens),
            logprobs=tuple(row.logprobs),
            weight_versions=(self.weight_version,) * len(row.tokens),
            finish_reason=row.finish_reason,
            routed_experts=np.concatenate(row.routes) if self.return_routes else None,
        )
