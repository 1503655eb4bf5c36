"""The rollout engine on vLLM: continuous batching, in this process or in one that vLLM spawns.

Run with vLLM 0.32.0 on a CPU; on GPUs, where it is written for 0.26.0, never yet.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config.errors import UserError
from posttrain.rollout.types import FinishReason, LogprobSemantics, RolloutOutput, RolloutRequest, WeightSource
from posttrain.rollout.vllm import versions
from posttrain.rollout.vllm.calls import call_workers
from posttrain.rollout.vllm.environment import set_environment

RPC_SECONDS = 600.0
"""Longest wait for vLLM's workers in one call."""


@dataclass
class _Open:
    """A request that vLLM has."""

    name: str
    request: RolloutRequest
    version: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    routes: np.ndarray | None = None

    def take(self, completion: Any) -> None:
        """Add what a step gave."""
        new = list(completion.token_ids)
        self.tokens += new
        self.logprobs += [place[token].logprob for place, token in zip(completion.logprobs or (), new, strict=True)]
        if completion.finish_reason is not None:
            stopped = bool(self.tokens) and self.tokens[-1] in self.request.params.stop_token_ids
            self.finish_reason = "stop" if stopped else "length"

    def output(self) -> RolloutOutput:
        """What the port gives."""
        assert self.finish_reason is not None
        return RolloutOutput(
            self.request.request_id,
            tuple(self.tokens),
            tuple(self.logprobs),
            (self.version,) * len(self.tokens),
            self.finish_reason,
            self.routes,
        )


class VLLMEngine:
    """A `RolloutEngine` on a checkpoint folder.

    Several threads may call `generate` at once: their requests are batched together. An update of weights waits for the requests
    that run, and requests that come meanwhile wait for the update, so that no state of older weights is gone on with.

    Tokens are drawn by the same noise as the embedded engine's, so equal weights give equal tokens, up to rounding.

    Attributes:
        weight_version: of the weights that serve.
        concurrent: several calls of `generate` may run at a time.
        progress: steps made so far.
    """

    logprob_semantics: LogprobSemantics = "processed"
    concurrent = True

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        version: int = 0,
        return_routes: bool = False,
        own_process: bool = True,
        tensor_parallel: int = 1,
        max_batch_size: int = 256,
        max_batch_tokens: int = 8192,
        cache_bytes: int | None = None,
        max_length: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Start vLLM on a checkpoint.

        Args:
            checkpoint: folder, of any kind of names; no tokenizer is needed.
            version: of its weights.
            return_routes: record the experts of every token. On a CPU prefix caching must be off, as it is by default.
            own_process: vLLM's loop runs in a spawned process; False keeps it here, which suits tiny models. The first engine
                of a process decides for all.
            tensor_parallel: ranks that share every layer; more than one need processes of their own.
            max_batch_size: most sequences in a step.
            max_batch_tokens: most tokens in a step; longer prompts are taken in by parts.
            cache_bytes: for keys, values and states; None takes 1 GiB on a CPU, and what vLLM leaves free on a GPU.
            max_length: longest prompt and answer together; None takes the model's longest position.
            arguments: more of vLLM's `EngineArgs`, which win over those made here.

        Raises:
            UserError: vLLM is missing or of a version that cannot be used, or there is no checkpoint.
        """
        versions.check()
        fields = read_config(checkpoint)
        set_environment(own_process=own_process)
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        from posttrain.rollout.vllm.backends import EXTENSION, HOST_BACKEND
        from posttrain.rollout.vllm.plugin import register
        from posttrain.rollout.vllm.updates import VLLMWeights

        register()  # spawned processes find it as an entry point
        on_host = current_platform.is_cpu()
        self.max_length = max_length or int(fields["max_position_embeddings"])
        self.vocab_size = int(fields["vocab_size"])
        chosen: dict[str, Any] = {
            "model": str(checkpoint),
            "skip_tokenizer_init": True,
            # Not "auto", with which vLLM serves an fp32 checkpoint in bf16.
            "dtype": str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"),
            "max_model_len": self.max_length,
            "max_num_seqs": max_batch_size,
            "max_num_batched_tokens": max_batch_tokens,
            "tensor_parallel_size": tensor_parallel,
            "enable_prefix_caching": False,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": EXTENSION,
            "weight_transfer_config": {"backend": HOST_BACKEND},
            "disable_log_stats": True,
            "seed": 0,
        }
        if on_host:
            chosen["enforce_eager"] = True
            chosen["kv_cache_memory_bytes"] = cache_bytes or 2**30
        elif cache_bytes is not None:
            chosen["kv_cache_memory_bytes"] = cache_bytes
        if return_routes and not on_host:
            chosen["enable_return_routed_experts"] = True
        chosen.update(arguments or {})
        if return_routes and on_host and chosen["enable_prefix_caching"]:
            raise UserError("experts of cached prompts are not computed again", instead="leave prefix caching off to record them")
        self.return_routes = return_routes
        self.weight_version = version
        self.progress = 0
        self._routes_on_host = return_routes and on_host
        self._llm: Any = LLMEngine.from_engine_args(EngineArgs(**chosen))
        self._weights = VLLMWeights(self._llm, version=version, checkpoint=Path(checkpoint), timeout=RPC_SECONDS)
        self._serial = itertools.count()
        self._open: dict[str, _Open] = {}
        self._cancelled: set[str] = set()
        self._step_turn = threading.Lock()
        self._gate = _Gate()
        self._dead: BaseException | None = None
        self._closed = False
        for fault in call_workers(self._llm, "posttrain_begin", (self._routes_on_host,), RPC_SECONDS):
            if fault:
                self.close()
                raise UserError(str(fault))

    def generate(self, requests: Sequence[RolloutRequest]) -> list[RolloutOutput]:
        """Continue every request, see `RolloutEngine.generate`.

        Raises:
            RuntimeError: vLLM ended; the engine must be replaced.
        """
        limits = [self._limit(request) for request in requests]
        with self._gate.shared():
            with self._step_turn:
                self._check()
                opened = [self._add(request, limit) for request, limit in zip(requests, limits, strict=True)]
            while any(one.finish_reason is None for one in opened):
                with self._step_turn:
                    self._check()
                    if any(one.finish_reason is None for one in opened):
                        self._step()
        return [one.output() for one in opened]

    def update_weights(self, source: WeightSource) -> None:
        """Take over new weights between requests, see `RolloutEngine.update_weights` and `VLLMWeights.update`."""
        with self._gate.alone(), self._step_turn:
            self._check()
            try:
                self._weights.update(source)
            finally:
                self.weight_version = self._weights.weight_version

    def cancel(self, request_ids: Iterable[str]) -> None:
        """End requests that run, once each has its first token (call from another thread)."""
        wanted = set(request_ids)
        self._cancelled |= {name for name, one in list(self._open.items()) if one.request.request_id in wanted}

    def close(self) -> None:
        """End vLLM; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        from vllm.distributed import cleanup_dist_env_and_memory

        self._weights.close()
        self._llm.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._dead is not None:
            raise RuntimeError(f"vLLM ended: {type(self._dead).__name__}: {self._dead}") from self._dead

    def _limit(self, request: RolloutRequest) -> int:
        """Most tokens the request may generate. ValueError where it cannot run."""
        room = self.max_length - len(request.prompt_ids)
        if not request.prompt_ids or room < 1:
            raise ValueError(f"request {request.request_id}: a prompt needs 1 to {self.max_length - 1} tokens")
        if not all(0 <= token < self.vocab_size for token in request.prompt_ids):
            raise ValueError(f"request {request.request_id}: a token is outside of the vocabulary of {self.vocab_size}")
        if request.params.top_p != 1.0:
            raise ValueError(
                f"request {request.request_id}: top_p below 1 would bias importance ratios; the full vocabulary is sampled"
            )
        if request.params.max_new_tokens < 1:
            raise ValueError(f"request {request.request_id}: max_new_tokens must be at least 1")
        return min(request.params.max_new_tokens, room)

    def _add(self, request: RolloutRequest, limit: int) -> _Open:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from posttrain.rollout.vllm.extension import NAME, SEED, TEMPERATURE

        one = _Open(str(next(self._serial)), request, self.weight_version)
        params = request.params
        sampling = SamplingParams(
            max_tokens=limit,
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=True,  # the request says what ends it
            detokenize=False,
            logprobs=0,
            output_kind=RequestOutputKind.DELTA,
            extra_args={NAME: one.name, SEED: params.seed, TEMPERATURE: params.temperature},
        )
        self._llm.add_request(one.name, {"prompt_token_ids": list(request.prompt_ids)}, sampling)
        self._open[one.name] = one
        return one

    def _step(self) -> None:
        """One step of vLLM for everybody's requests."""
        try:
            outputs = self._llm.step()
            self.progress += 1
            ended = []
            for output in outputs:
                one = self._open[output.request_id]
                one.take(output.outputs[0])
                if one.finish_reason is not None:
                    ended.append(one)
                    if self.return_routes and not self._routes_on_host:
                        one.routes = np.asarray(output.outputs[0].routed_experts)
            stopped = [self._open[name] for name in self._cancelled if name in self._open]
            stopped = [one for one in stopped if one.tokens and one.finish_reason is None]
            if stopped:
                self._llm.abort_request([one.name for one in stopped])
                for one in stopped:
                    one.finish_reason = "cancelled"
            self._close_requests([*ended, *stopped])
        except BaseException as error:
            self._dead = error
            raise

    def _close_requests(self, ended: Sequence[_Open]) -> None:
        if not ended:
            return
        names = [one.name for one in ended]
        if self._routes_on_host:
            found = call_workers(self._llm, "posttrain_take_routes", (names,), RPC_SECONDS)[0]
            for one, (shape, data) in zip(ended, found, strict=True):
                one.routes = np.frombuffer(data, dtype=np.int16).reshape(shape)
        for one in ended:
            if self.return_routes and one.routes is not None:
                one.routes = one.routes[: len(one.request.prompt_ids) + len(one.tokens) - 1].astype(np.int16)
            elif not self.return_routes:
                one.routes = None
            del self._open[one.name]
            self._cancelled.discard(one.name)


class _Gate:
    """Many may pass together, or one alone; who wants to be alone goes before those that come later."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._wanting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Pass with others."""
        with self._condition:
            self._condition.wait_for(lambda: not self._wanting)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Pass alone; inside, the condition is held, so nobody enters."""
        with self._condition:
            self._wanting += 1
            try:
                self._condition.wait_for(lambda: not self._inside)
                yield
            finally:
                self._wanting -= 1
                self._condition.notify_all()


def read_config(checkpoint: Path | str) -> dict[str, Any]:
    """Fields of a checkpoint's config.json. UserError where there is none."""
    file = Path(checkpoint) / "config.json"
    try:
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError("there is no checkpoint here, its config.json is missing", where=str(checkpoint)) from None
    except ValueError:
        raise UserError("is not a JSON object", where=str(file)) from None
    return fields
