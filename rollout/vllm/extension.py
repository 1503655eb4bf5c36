"""What rollouts add to vLLM's workers: our own noise, the experts of every token, and updates of weights.

vLLM's seeds are one random generator a request. On a CPU they fail under chunked prefill (their offset cannot be set back), and
no other engine draws the same tokens. So rows whose request carries our parameters are drawn as every engine here draws them.

Written for vLLM's model runner V1: of 0.26 on GPUs and of 0.32 on CPUs; run with the latter. Facts used:
v1/worker/gpu_model_runner.py (`requests`, `input_batch`, `query_start_loc`, `sampler`), v1/sample/sampler.py, v1/outputs.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from posttrain.rollout.drawing import sample
from posttrain.rollout.vllm.transfer import WeightWorkerExtension

NAME, SEED, TEMPERATURE = "posttrain_name", "posttrain_seed", "posttrain_temperature"
"""Keys of a request's `SamplingParams.extra_args`. The temperature goes here because vLLM takes 0.01 to 2 alone."""


class RolloutWorkerExtension(WeightWorkerExtension):
    """Calls of a rollout engine; each answers with what survives vLLM's messages: texts, numbers, bytes."""

    model_runner: Any
    _posttrain_routes: Routes | None = None

    def posttrain_begin(self, record_routes: bool) -> str:
        """Draw tokens by our noise from now on. What stands against it, or an empty text.

        Args:
            record_routes: remember the experts of every token, on a CPU (vLLM itself does on a GPU).
        """
        runner = self.model_runner
        if not hasattr(runner, "requests") or not hasattr(runner, "input_batch") or not hasattr(runner, "sampler"):
            return "rollouts need vLLM's model runner V1; set VLLM_USE_V2_MODEL_RUNNER=0"
        draw = Drawing(runner, runner.sampler.forward)
        runner.sampler.forward = draw
        if record_routes:
            self._posttrain_routes = Routes(runner)
        return ""

    def posttrain_take_routes(self, names: list[str]) -> list[tuple[list[int], bytes]]:
        """Shape and bytes (int16) of the experts of each request's tokens, which are forgotten here."""
        assert self._posttrain_routes is not None, "routes are not recorded"
        taken = [self._posttrain_routes.take(name) for name in names]
        return [(list(routes.shape), routes.tobytes()) for routes in taken]


class Drawing:
    """In the place of vLLM's sampler: the whole vocabulary, our noise, the chosen token's log-probability."""

    def __init__(self, runner: Any, original: Any) -> None:
        self.runner, self.original = runner, original

    def __call__(self, logits: torch.Tensor, sampling_metadata: Any, *rest: Any, **options: Any) -> Any:
        """`Sampler.forward`. Batches without our parameters (a warm-up) are vLLM's own."""
        batch, requests = self.runner.input_batch, self.runner.requests
        states = [requests[name] for name in batch.req_ids[: batch.num_reqs]]
        given = [getattr(state.sampling_params, "extra_args", None) or {} for state in states]
        if not any(SEED in arguments for arguments in given):
            return self.original(logits, sampling_metadata, *rest, **options)
        if len(given) != logits.shape[0] or not all(SEED in arguments for arguments in given):
            raise RuntimeError("a batch of rollouts holds rows that are none; speculative decoding cannot be used for them")
        from vllm.v1.outputs import LogprobsTensors, SamplerOutput

        device = logits.device
        tokens, logprobs = sample(
            logits.float(),
            torch.tensor([arguments[SEED] for arguments in given], dtype=torch.int64, device=device),
            torch.tensor([arguments[TEMPERATURE] for arguments in given], dtype=torch.float32, device=device),
            torch.tensor([len(state.output_token_ids) for state in states], dtype=torch.int64, device=device),
        )
        chosen = tokens.to(torch.int32)[:, None]
        ranks = torch.zeros_like(tokens)  # how many tokens are likelier: vLLM wants a number, and we never read it
        return SamplerOutput(chosen, LogprobsTensors(chosen, logprobs.float()[:, None], ranks))


class Routes:
    """The experts of every token that was fed, by request; a token that is fed again after a preemption is written over."""

    def __init__(self, runner: Any) -> None:
        from posttrain.rollout.vllm.experts import SparseMoe

        self.runner = runner
        self.layers = sorted(module.layer for module in runner.model.modules() if isinstance(module, SparseMoe))
        self.places = {layer: place for place, layer in enumerate(self.layers)}
        self.step: list[torch.Tensor] = []
        self.found: dict[str, np.ndarray] = {}
        self.lengths: dict[str, int] = {}
        for module in runner.model.modules():
            if isinstance(module, SparseMoe):
                module.record = self.record

    def record(self, layer: int, routes: torch.Tensor) -> None:
        """One layer of one step, int64 [T, k]; layers come in their order."""
        self.step.append(routes)
        if layer == self.layers[-1]:
            step = torch.stack(self.step, dim=1).to(torch.int16).cpu().numpy()  # [T, layers, k]
            self.step = []
            self._share_out(step)

    def take(self, name: str) -> np.ndarray:
        """Of one request, int16 [tokens fed, layers, k]; it is forgotten here."""
        return self.found.pop(name)[: self.lengths.pop(name)]

    def _share_out(self, step: np.ndarray) -> None:
        batch = self.runner.input_batch
        starts = self.runner.query_start_loc.np
        for row, identity in enumerate(batch.req_ids[: batch.num_reqs]):
            name = (self.runner.requests[identity].sampling_params.extra_args or {}).get(NAME)
            if name is None:
                continue
            part = step[starts[row] : starts[row + 1]]
            first = int(batch.num_computed_tokens_cpu[row])
            self._room(name, first + len(part), step.shape[1:])[first : first + len(part)] = part

    def _room(self, name: str, length: int, shape: tuple[int, ...]) -> np.ndarray:
        held = self.found.get(name)
        if held is None or len(held) < length:
            grown = np.zeros((max(64, 2 * length), *shape), dtype=np.int16)
            if held is not None:
                grown[: len(held)] = held
            self.found[name] = held = grown
        self.lengths[name] = max(length, self.lengths.get(name, 0))
        return held
